"""Where autograd and modules meet the walk: what is called before and after each forward and backward.

[Note: when a unit's backward begins and ends]
It begins when the node that made one of its outputs is about to run (a pre-hook on that node). It ends when the
gradients of its inputs are complete. For that, inputs that need a gradient are replaced by views of themselves: a
tensor that several units read (an encoder's output) is complete only when all of them are done, the view when this unit
is. The view's node runs before the pre-hook of the unit below, so a unit is freed before the next but one is gathered.

Neither has to be true for values to be right: entries.py gathers whatever backward reads. Where a hook does not run (a
view changed in place loses its node, an input may get no gradient) a unit is gathered later or freed later.
"""

import weakref

import torch
from torch import nn

from zerolite.engine.engine import Engine
from zerolite.engine.entries import Entries
from zerolite.engine.graph_task import is_in_backward
from zerolite.engine.trees import map_tree, tensors_of
from zerolite.errors import ZeroliteError
from zerolite.shards.bucket import TrainableBucket, Unit


def install(engine: Engine, unit: Unit, entries: Entries) -> None:
    """Hook one unit's module and its trainable parameters."""
    uses: list[_Use] = []
    entries.add(unit)
    for module in entrances(unit):
        module.register_forward_pre_hook(_BeforeForward(engine, unit, uses, entries), with_kwargs=True, prepend=True)
        module.register_forward_hook(_AfterForward(engine, unit, uses, entries), always_call=True)
    for bucket in unit.buckets:
        if isinstance(bucket, TrainableBucket):
            for index, parameter in enumerate(bucket.parameters.tensors):
                parameter.register_post_accumulate_grad_hook(_AfterGradient(engine, bucket, index))


def entrances(unit: Unit) -> list[nn.Module]:
    """The unit's module and, for the root, every module that owns some of its parameters.

    Those may be called from outside the root's forward: `generate` of an encoder-decoder calls the encoder alone.
    """
    if not unit.is_root:
        return [unit.module]
    own = {id(parameter) for bucket in unit.buckets for parameter in bucket.parameters.tensors}
    owners = [m for m in unit.module.modules() if any(id(p) in own for p in m.parameters(recurse=False))]
    return [unit.module, *(module for module in owners if module is not unit.module)]


class _Use:
    """One forward of a unit and the backward through it, which may begin at several outputs and ends once.

    The graph owns it, in C++, and a module may keep a loss with its graph: it must keep nobody alive.
    """

    def __init__(self, engine: Engine, unit: Unit):
        self._engine, self._unit = weakref.ref(engine), weakref.ref(unit)
        self.is_running = False
        self.is_watching = False  # saved tensors, for the time of the forward
        self.is_transformed = False  # by torch.func
        self.has_begun = False
        self.inputs = self.missing = 0  # views of inputs; those whose gradient has not come in this backward

    def begin(self, gradients) -> None:
        is_first, self.has_begun = not self.has_begun, True
        engine, unit = self._engine(), self._unit()
        if engine is not None and unit is not None:  # else nobody steps this model any more
            engine.pre_backward(unit, is_first)

    def complete_input(self) -> None:
        """The gradient of one input is complete."""
        self.missing -= 1
        engine, unit = self._engine(), self._unit()
        if engine is None or unit is None:
            return
        if self.missing == 0:
            has_begun, self.has_begun, self.missing = self.has_begun, False, self.inputs
            engine.post_backward(unit, has_begun)
        else:
            engine.expect_end(unit)


class _BeforeForward:
    """torch.compile of the model does not trace it: collectives are no graph."""

    def __init__(self, engine: Engine, unit: Unit, uses: list[_Use], entries: Entries):
        self.engine, self.unit, self.uses, self.entries = engine, unit, uses, entries

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args, kwargs):
        use = _Use(self.engine, self.unit)
        self.uses.append(use)
        use.is_transformed = self.entries.is_transformed(self.unit)
        use.is_running = True
        self.engine.pre_forward(self.unit)
        if use.is_transformed or not torch.is_grad_enabled():
            return None
        use.is_watching = self.entries.watch()
        return None if self.unit.is_root else _view_inputs(args, kwargs, use)


class _AfterForward:
    """As _BeforeForward, not traced."""

    def __init__(self, engine: Engine, unit: Unit, uses: list[_Use], entries: Entries):
        self.engine, self.unit, self.uses, self.entries = engine, unit, uses, entries

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args, output):
        engine, unit, use = self.engine, self.unit, self.uses.pop()
        if not use.is_running:
            return None  # refused; this hook is called for what raised, too
        if use.is_watching:
            self.entries.unwatch()
        output = self.entries.keep_outputs(output)
        nodes = {}
        is_outermost = unit.forward_depth == 1  # not an owner of the root's inside the root's forward
        if is_outermost and torch.is_grad_enabled() and not use.is_transformed:
            nodes = {id(t.grad_fn): t.grad_fn for t in tensors_of(output) if t.grad_fn is not None}
        for node in nodes.values():
            node.register_prehook(use.begin)
        engine.post_forward(unit, bool(nodes))
        return output


class _AfterGradient:
    """The parameter owns it in C++, where the garbage collector does not look: it must not keep the engine alive."""

    def __init__(self, engine: Engine, bucket: TrainableBucket, index: int):
        self.engine, self.bucket, self.index = weakref.ref(engine), weakref.ref(bucket), index

    @torch.no_grad()
    def __call__(self, parameter: nn.Parameter) -> None:
        engine, bucket = self.engine(), self.bucket()
        if engine is not None and bucket is not None:  # a parameter that outlives its model is plain torch's again
            engine.accumulate_gradient(bucket, self.index, parameter)


def _view_inputs(args, kwargs, use: _Use):
    """Replace inputs that need a gradient by views; `use` is told when each view's gradient is complete.

    Plain views may be written to in place, outputs of a Function of several may not.
    """

    def view(leaf: torch.Tensor) -> torch.Tensor:
        if not _needs_gradient(leaf):
            return leaf
        leaf = leaf.view_as(leaf)
        leaf.register_hook(lambda gradient: use.complete_input())
        use.inputs += 1
        return leaf

    viewed = map_tree(view, (args, kwargs))
    use.missing = use.inputs
    return viewed if use.inputs else None


def _needs_gradient(leaf: torch.Tensor) -> bool:
    return leaf.requires_grad and not isinstance(leaf, nn.Parameter)


# Root-only hooks #


def scale_loss(engine: Engine) -> None:
    """fp16: what the model returns carries the loss scale into backward; gradients of its inputs are divided by it.

    Outputs come out in fp32, so that a loss computed from them is scaled before its gradient is rounded to fp16.
    """

    def enter(module, args, kwargs):
        if torch.is_grad_enabled() and not is_in_backward():
            return map_tree(lambda leaf: _map_floating(leaf, _Unscale, engine), (args, kwargs))
        return None

    def leave(module, args, output):
        if torch.is_grad_enabled():
            return map_tree(lambda leaf: _map_floating(leaf, _Scale, engine), output)
        return None

    engine.model.register_forward_pre_hook(enter, with_kwargs=True)
    engine.model.register_forward_hook(leave)


def _map_floating(leaf, function, engine: Engine):
    return function.apply(leaf, engine) if _needs_gradient(leaf) else leaf


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: torch.Tensor, engine: Engine):
        ctx.engine, ctx.dtype = weakref.ref(engine), output.dtype
        return output.to(torch.float32, copy=True)

    @staticmethod
    def backward(ctx, gradient):
        engine = _engine_of(ctx)
        engine.mark_loss_scaled()
        return (gradient * _scale_of(engine)).to(ctx.dtype), None


class _Unscale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: torch.Tensor, engine: Engine):
        ctx.engine = weakref.ref(engine)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / _scale_of(_engine_of(ctx)), None


def _scale_of(engine: Engine) -> float:
    assert engine.loss_scale is not None, "`scale_loss` is for fp16"
    return engine.loss_scale.value


def _engine_of(ctx) -> Engine:
    engine = ctx.engine()
    if engine is None:
        raise ZeroliteError("backward of a sharded model that is gone: keep the model until its backward is done")
    return engine


def cast_inputs(engine: Engine, dtype: torch.dtype) -> None:
    """Floating inputs of the model arrive in the parameters' dtype."""

    def cast(leaf):
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: map_tree(cast, (args, kwargs)), with_kwargs=True
    )
