"""Where autograd and modules meet the walk: what is called before and after each forward and backward.

[Note: when a unit's backward begins and ends]
It begins when the node that made one of its outputs is about to run (a pre-hook on that node). It ends when the
gradients of its inputs are complete. For that, inputs that need a gradient are replaced by views of themselves: a
tensor that several units read (an encoder's output) is complete only when all of them are done, the view when this unit
is. The view's node runs before the pre-hook of the unit below, so a unit is freed before the next but one is gathered.
"""

import weakref

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zerolite.engine.engine import Engine
from zerolite.engine.graph_task import is_in_backward
from zerolite.shards.bucket import TrainableBucket, Unit


def install(engine: Engine, unit: Unit) -> None:
    """Hook one unit's module and its trainable parameters."""
    uses: list[_Use] = []
    for module in _entrances(unit):
        module.register_forward_pre_hook(_BeforeForward(engine, unit, uses), with_kwargs=True, prepend=True)
        module.register_forward_hook(_AfterForward(engine, unit, uses), always_call=True)
    for bucket in unit.buckets:
        if isinstance(bucket, TrainableBucket):
            for index, parameter in enumerate(bucket.parameters.tensors):
                parameter.register_post_accumulate_grad_hook(_AfterGradient(engine, bucket, index))


def _entrances(unit: Unit) -> list[nn.Module]:
    """The unit's module and, for the root, every module that owns some of its parameters.

    Those may be called from outside the root's forward: `generate` of an encoder-decoder calls the encoder alone.
    """
    if not unit.is_root:
        return [unit.module]
    own = {id(parameter) for bucket in unit.buckets for parameter in bucket.parameters.tensors}
    owners = [m for m in unit.module.modules() if any(id(p) in own for p in m.parameters(recurse=False))]
    return [unit.module, *(module for module in owners if module is not unit.module)]


class _Use:
    """One forward of a unit and the backward through it, which may begin at several outputs and ends once."""

    def __init__(self, engine: Engine, unit: Unit):
        self.engine, self.unit = engine, unit
        self.has_begun = False

    def begin(self, gradients) -> None:
        is_first, self.has_begun = not self.has_begun, True
        self.engine.pre_backward(self.unit, is_first)

    def end(self) -> None:
        self.has_begun = False
        self.engine.post_backward(self.unit)


class _BeforeForward:
    def __init__(self, engine: Engine, unit: Unit, uses: list[_Use]):
        self.engine, self.unit, self.uses = engine, unit, uses

    def __call__(self, module: nn.Module, args, kwargs):
        self.uses.append(_Use(self.engine, self.unit))
        self.engine.pre_forward(self.unit)
        if self.unit.is_root or not torch.is_grad_enabled():
            return None
        return _view_inputs(args, kwargs, self.uses[-1].end)


class _AfterForward:
    def __init__(self, engine: Engine, unit: Unit, uses: list[_Use]):
        self.engine, self.unit, self.uses = engine, unit, uses

    def __call__(self, module: nn.Module, args, output):
        engine, unit, use = self.engine, self.unit, self.uses.pop()
        nodes = {}
        if torch.is_grad_enabled() and unit.forward_depth == 1:  # not an owner of the root's inside the root's forward
            nodes = {id(t.grad_fn): t.grad_fn for t in tensors_of(output) if t.grad_fn is not None}
        for node in nodes.values():
            node.register_prehook(use.begin)
        engine.post_forward(unit, bool(nodes))


class _AfterGradient:
    """The parameter owns it in C++, where the garbage collector does not look: it must not keep the engine alive."""

    def __init__(self, engine: Engine, bucket: TrainableBucket, index: int):
        self.engine, self.bucket, self.index = weakref.ref(engine), weakref.ref(bucket), index

    @torch.no_grad()
    def __call__(self, parameter: nn.Parameter) -> None:
        engine, bucket = self.engine(), self.bucket()
        if engine is not None and bucket is not None:  # a parameter that outlives its model is plain torch's again
            engine.accumulate_gradient(bucket, self.index, parameter)


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _view_inputs(args, kwargs, after_backward):
    """Replace inputs that need a gradient by views; `after_backward()` runs when all the views' gradients are there."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    where = [index for index, leaf in enumerate(leaves) if _needs_gradient(leaf)]
    if not where:
        return None
    if len(where) == 1:
        # The usual block. A plain view may be written to in place, an output of the Function below may not.
        (index,) = where
        leaves[index] = leaves[index].view_as(leaves[index])
        leaves[index].register_hook(lambda gradient: after_backward())
    else:
        for index, view in zip(where, _Views.apply(after_backward, *(leaves[index] for index in where)), strict=True):
            leaves[index] = view
    return pytree.tree_unflatten(leaves, structure)


def _needs_gradient(leaf) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad and not isinstance(leaf, nn.Parameter)


class _Views(torch.autograd.Function):
    """Views of several tensors whose backward runs once, when no more of their gradients can come.

    torch.autograd.graph.register_multi_grad_hook does the same, but its hook holds the nodes that hold it (torch 2.13):
    every forward's graph would stay for ever.
    """

    @staticmethod
    def forward(ctx, after_backward, *inputs):
        ctx.after_backward = after_backward
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx, *gradients):
        ctx.after_backward()
        return None, *gradients


# Root-only hooks #


def scale_loss(engine: Engine) -> None:
    """fp16: what the model returns carries the loss scale into backward; gradients of its inputs are divided by it.

    Outputs come out in fp32, so that a loss computed from them is scaled before its gradient is rounded to fp16.
    """

    def enter(module, args, kwargs):
        if torch.is_grad_enabled() and not is_in_backward():
            return pytree.tree_map(lambda leaf: _map_floating(leaf, _Unscale, engine), (args, kwargs))
        return None

    def leave(module, args, output):
        if torch.is_grad_enabled():
            return pytree.tree_map(lambda leaf: _map_floating(leaf, _Scale, engine), output)
        return None

    engine.model.register_forward_pre_hook(enter, with_kwargs=True)
    engine.model.register_forward_hook(leave)


def _map_floating(leaf, function, engine: Engine):
    return function.apply(leaf, engine) if _needs_gradient(leaf) else leaf


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: torch.Tensor, engine: Engine):
        ctx.engine, ctx.dtype = engine, output.dtype
        return output.to(torch.float32, copy=True)

    @staticmethod
    def backward(ctx, gradient):
        ctx.engine.mark_loss_scaled()
        return (gradient * ctx.engine.loss_scale.value).to(ctx.dtype), None


class _Unscale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: torch.Tensor, engine: Engine):
        ctx.engine = engine
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / ctx.engine.loss_scale.value, None


def cast_inputs(engine: Engine, dtype: torch.dtype) -> None:
    """Floating inputs of the model arrive in the parameters' dtype."""

    def cast(leaf):
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: pytree.tree_map(cast, (args, kwargs)), with_kwargs=True
    )
