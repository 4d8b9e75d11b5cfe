"""What lives in a step beside model states: one forward and backward of a model on fake tensors, event by event.

No table of architectures: the model's own code runs, with its attention, its loss and its activation checkpointing, on
tensors that have shapes and no memory (FakeTensorMode), and `LiveStoragesAndFlops` counts. So what autograd saves is
counted by the storage, once, and what is only there for a moment is in the peak between two events. Gradients of
parameters count until autograd hands them over.

[Note: repeated blocks run four times]
Of a run of blocks that are alike, the first three and the last are run. The others are skipped by a function that only
makes their outputs, and get the events of the third: forward from its start to the start of the next unit, backward
from its start to the start of the previous one. So a model of 80 blocks takes as long as one of four.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from zerolite.config import Precision
from zerolite.engine.graph_task import is_in_backward
from zerolite.engine.trees import map_tree, tensors_of
from zerolite.memory.live_storages import LiveStoragesAndFlops
from zerolite.memory.moments import Event, Moment, Profile
from zerolite.memory.skipped_blocks import SkippedBlocks, alike_runs, expanded
from zerolite.offload.placement import DtypeOf
from zerolite.shards.units import UnitPlan

Step = Callable[[nn.Module], torch.Tensor]  # one forward of the model, with inputs that it makes; returns the loss

# Operations whose results depend on values (routing of experts) run on real ones, up to this many parameters.
MAX_REAL_NUMEL = 64 * 1024 * 1024


def profile(model: nn.Module, plans: Sequence[UnitPlan], dtype_of: DtypeOf, step: Step) -> Profile:
    """Run `step` and its backward on fake tensors in the parameters' places; the model stays as it is.

    plans: of `plan_units`. dtype_of: the dtype that a parameter is to have. step: called once with the model; it makes
        its inputs, as torch.zeros(...), and returns the loss, a scalar.
    Where shapes depend on values, or an operation has no fake, it runs on real values drawn at random.
    Raises ValueError where that model has more than MAX_REAL_NUMEL parameters; what `step` raises, passes.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # it reports what is caught here
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with _fakes_left_out(model):
            return Profile(_run(model, plans, dtype_of, step, FakeTensorMode(allow_non_fake_inputs=True)))
    except RuntimeError as error:
        why = str(error).split("\n")[0][:200]
    finally:
        logger.disabled = was_disabled
    numel = sum(parameter.numel() for parameter in model.parameters())
    if numel > MAX_REAL_NUMEL:
        raise ValueError(
            f"{type(model).__name__} does not run on tensors without values ({why}), and with {numel:,} parameters it "
            "is too large to be run on real ones here: plan it in bf16 with experts_implementation='grouped_mm', or "
            "plan model states alone with batch=None"
        )
    with torch.random.fork_rng(devices=[]):
        return Profile(_run(model, plans, dtype_of, step, contextlib.nullcontext()), is_real=True)


@contextlib.contextmanager
def _fakes_left_out(model: nn.Module) -> Iterator[None]:
    """Whatever tensor a module has put into an attribute inside is taken out again, if it is a fake one."""
    before = {module: dict(vars(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            fakes = [name for name, value in vars(module).items() if isinstance(value, FakeTensor)]
            for name in fakes:
                del vars(module)[name]
                if name in attributes:
                    vars(module)[name] = attributes[name]


@contextlib.contextmanager
def scaled_output(model: nn.Module, precision: Precision | None) -> Iterator[None]:
    """Inside, an fp16 model returns fp32 copies, as the engine's loss scaling has it: engine/hooks.py, `scale_loss`."""
    if precision is None or precision.param is not torch.float16:
        yield
        return

    def copied(leaf: torch.Tensor) -> torch.Tensor:
        return _Scaled.apply(leaf) if leaf.requires_grad and leaf.is_floating_point() else leaf

    hook = model.register_forward_hook(lambda module, args, output: map_tree(copied, output))
    try:
        yield
    finally:
        hook.remove()


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: torch.Tensor):
        ctx.dtype = output.dtype
        return output.to(torch.float32, copy=True)

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * 1.0).to(ctx.dtype)


def _run(model, plans, dtype_of: DtypeOf, step: Step, mode) -> tuple[Moment, ...]:
    live = LiveStoragesAndFlops()
    recorder = _Recorder(live)
    resting = [module for module in model.modules() if not module.training]
    with mode, contextlib.ExitStack() as stack:
        is_real = not isinstance(mode, FakeTensorMode)
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            tensors[name] = _stand_in(parameter, dtype_of(parameter), is_real).requires_grad_(parameter.requires_grad)
        for name, buffer in model.named_buffers():
            tensors[name] = _stand_in(buffer, buffer.dtype, is_real) if not is_real or buffer.is_meta else buffer
        for index, plan in enumerate(plans):
            recorder.watch(stack, index, plan, tensors)
        skipped = SkippedBlocks(alike_runs(plans) if not is_real else [])
        stack.callback(skipped.restore)
        skipped.install(plans)
        model.train()
        stack.callback(_leave_training, resting)
        stack.enter_context(live)
        prefix = {f"model.{name}": tensor for name, tensor in tensors.items()}
        torch.func.functional_call(_Step(model, step, recorder), prefix, ())
    return expanded(recorder.moments(), plans, skipped.runs)


def _leave_training(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.training = False


def _stand_in(tensor: torch.Tensor, dtype: torch.dtype, is_real: bool) -> torch.Tensor:
    """Of a parameter's shape, on the CPU; real ones are small, so that no loss overflows."""
    if is_real and dtype.is_floating_point:
        return torch.randn(tensor.shape).mul_(0.02).to(dtype)
    return torch.zeros(tensor.shape, dtype=dtype) if is_real else torch.empty(tensor.shape, dtype=dtype)


class _Step(nn.Module):
    """Forward and backward in one call: a recomputation in backward must find the stand-ins, too."""

    def __init__(self, model: nn.Module, step: Step, recorder: "_Recorder"):
        super().__init__()
        self.model, self._step, self._recorder = model, step, recorder

    def forward(self) -> None:
        with torch.enable_grad():
            loss = self._step(self.model)
        self._recorder.mark(Event.LOSS, 0)
        loss.backward()
        del loss
        self._recorder.mark(Event.END, 0)


class _Recorder:
    """Turns what hooks see into moments; the engine's own hooks see the same: engine/hooks.py."""

    def __init__(self, live: LiveStoragesAndFlops):
        self._live = live
        self._marks: list[tuple[Event, int, str, int, int]] = []  # ..., live bytes, flops until then
        self._peaks: list[int] = []  # before each mark

    def mark(self, event: Event, unit: int, parameter: str = "") -> None:
        self._peaks.append(self._live.take_peak())
        self._marks.append((event, unit, parameter, self._live.current_bytes, self._live.flops))

    def moments(self) -> list[Moment]:
        peaks = [*self._peaks[1:], self._live.take_peak()]
        ends = [*(mark[4] for mark in self._marks[1:]), self._live.flops]
        return [
            Moment(event, unit, name, live, max(peak, live), end - flops)
            for (event, unit, name, live, flops), peak, end in zip(self._marks, peaks, ends, strict=True)
        ]

    def watch(self, stack: contextlib.ExitStack, index: int, plan: UnitPlan, tensors: dict[str, torch.Tensor]) -> None:
        """Mark what happens to one unit."""
        before = plan.module.register_forward_pre_hook(partial(self._before, index), with_kwargs=True, prepend=True)
        after = plan.module.register_forward_hook(partial(self._after, index), always_call=True)
        stack.callback(before.remove)
        stack.callback(after.remove)
        for group in plan.groups if plan.is_trainable else ():
            for name in group.names if group.is_trainable else ():
                tensors[name].register_post_accumulate_grad_hook(partial(self._gradient, index, name))

    def _before(self, index: int, module: nn.Module, args, kwargs):
        if is_in_backward():
            return None  # a recomputation is part of the unit's backward
        self.mark(Event.FORWARD, index)
        missing: list[int] = []  # views whose gradient has not come

        def complete(gradient: torch.Tensor) -> None:
            missing.pop()
            if not missing:
                self.mark(Event.END_BACKWARD, index)

        def view(leaf: torch.Tensor) -> torch.Tensor:
            if not leaf.requires_grad or isinstance(leaf, nn.Parameter):
                return leaf
            leaf = leaf.view_as(leaf)
            leaf.register_hook(complete)
            missing.append(index)
            return leaf

        return map_tree(view, (args, kwargs)) if index != 0 else None

    def _after(self, index: int, module: nn.Module, args, output) -> None:
        if is_in_backward():
            return
        has_begun: list[bool] = []

        def begin(gradients) -> None:
            self.mark(Event.BACKWARD_AGAIN if has_begun else Event.BACKWARD, index)
            has_begun.append(True)

        for node in {t.grad_fn for t in tensors_of(output) if t.grad_fn is not None}:
            node.register_prehook(begin)
        self.mark(Event.END_FORWARD, index)

    def _gradient(self, index: int, name: str, parameter: torch.Tensor) -> None:
        self.mark(Event.GRADIENT, index, name)
        parameter.grad = None  # the engine has copied it into its bucket
