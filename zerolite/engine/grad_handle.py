"""`parameter.grad` of a sharded parameter: a tensor without memory that answers what torch's own tools ask.

    norms       linalg.vector_norm, _foreach_norm, Tensor.norm: the global norm of the whole gradient. Collective
    scaling     mul_, div_, _foreach_mul_, _foreach_div_ by numbers: a factor that steps and norms take into account
    GradScaler  the finite check over all ranks, and the unscaling. Collective
    clearing    zero_, _foreach_zero_; None instead of a handle clears the gradient, too

Hence clip_grad_norm_, GradScaler, any zero_grad, logging of norms and pipelining's scaling of gradients work unchanged.
Every other operation is an error that names the parameter and the way out: the elements lie in shards.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from zerolite.engine.graph_task import is_in_backward
from zerolite.errors import ZeroliteError


class Answers(Protocol):
    """Who knows a slot's gradient: engine.grad_handles.GradHandles, through `HandledSlot`."""

    name: str  # of the parameter

    def norm(self) -> float:
        """Of the whole gradient, over all ranks, scaled as it was asked for. Collective."""

    def scale(self, factor: float) -> None:
        """Multiply the gradient."""

    def zero_(self) -> None:
        """Set the gradient to zero."""

    def forget_scales(self) -> None:
        """What scaled the gradients was no clip: `optimizer.grad_norm` is of what came out."""

    def number(self, factor: torch.Tensor) -> float:
        """The value of a tensor of one element; the host waits once for the same tensor."""


class GradHandle(torch.Tensor):
    """Shape, dtype and device of a parameter's gradient, and no memory.

    It lives while its parameter does, and is owned by it in C++, where the garbage collector does not look: `slot` must
    not keep the engine alive.
    """

    slot: Answers
    incoming: torch.Tensor | None  # what AccumulateGrad added before the engine knew of a backward

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, like: torch.Tensor, slot: Answers, dtype: torch.dtype | None = None, device=None):
        handle = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            dtype=dtype or like.dtype,
            device=device or like.device,
            storage_size=0,
        )
        handle.slot, handle.incoming = slot, None
        return handle

    def __format__(self, spec: str) -> str:
        if spec:
            raise _refusal(f"format '{spec}'", [self])
        return repr(self)

    def __repr__(self, *, tensor_contents=None) -> str:
        shape, dtype, device = tuple(self.shape), self.dtype, self.device
        return f"GradHandle({self.slot.name}, shape={shape}, dtype={dtype}, device='{device}', sharded)"

    @property
    def data(self):
        return GradHandle(self, self.slot)

    @data.setter
    def data(self, given) -> None:
        """`Module._apply` gives what it made of the handle; what became of the parameter is the guard's."""
        if not isinstance(given, GradHandle) or given.slot is not self.slot:
            raise _refusal("data = ...", [self])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        answer = _ANSWERS.get(func.overloadpacket)
        handles = _handles(args)
        if answer is None or not handles:
            raise _refusal(func.overloadpacket.__name__, _handles([*args, *(kwargs or {}).values()]))
        return answer(handles, *args, **(kwargs or {}))


def _refused(operation: str) -> Callable:
    def refuse(self: GradHandle, *args, **kwargs):
        raise _refusal(operation, [self])

    return refuse


# What torch answers before it dispatches, of memory that is not there, or refuses without a name.
_DIRECT = (
    "item", "tolist", "numpy", "data_ptr", "__bool__", "__int__", "__float__", "__complex__", "__index__",
    "__deepcopy__", "__reduce_ex__", "__dlpack__",
)  # fmt: skip
for _name in _DIRECT:
    setattr(GradHandle, _name, _refused(_name))


def _handles(args: Sequence[Any]) -> list[GradHandle]:
    """The handles that an operation is about: its first argument, or the list of tensors that this is."""
    for given in args:
        members = given if isinstance(given, list | tuple) else [given]
        if any(isinstance(member, GradHandle) for member in members):
            return [member for member in members if isinstance(member, GradHandle)]
    return []


def _refusal(operation: str, handles: Sequence[GradHandle]) -> ZeroliteError:
    name = handles[0].slot.name if handles else "a sharded parameter"
    return ZeroliteError(
        f"the gradient of {name} lies in zerolite's shards, and `{operation}` would need its elements: `.grad` gives "
        "norms (2-norm of the whole), takes numbers to scale with (mul_, div_, clip_grad_norm_, GradScaler) and can be "
        "cleared (zero_, None); optimizers are zerolite's: zerolite.AdamW(model.parameters()), or "
        "zerolite.like(torch_optimizer) for one that was built already"
    )


# What is answered: answer(handles, *args, **kwargs of the operation) #


def _norm(handles, given, order=2, dim=None, keepdim=False, *, dtype=None):
    (handle,) = handles
    dims = None if not dim and dim != 0 else {d % given.dim() for d in ([dim] if isinstance(dim, int) else dim)}
    if given is not handle or float(order) != 2 or keepdim or (dims is not None and len(dims) < given.dim()):
        raise _refusal(f"norm(ord={order}, dim={dim}, keepdim={keepdim})", handles)
    return _norm_tensor(handle, dtype)


def _foreach_norm(handles, given, order=2, dtype=None):
    if len(handles) != len(given) or float(order) != 2:
        raise _refusal(f"_foreach_norm(ord={order})", handles)
    return [_norm_tensor(handle, dtype) for handle in handles]


def _norm_tensor(handle: GradHandle, dtype: torch.dtype | None) -> torch.Tensor:
    """0-dim, at least fp32: a norm of 16-bit gradients must not overflow."""
    dtype = dtype or torch.promote_types(handle.dtype, torch.float32)
    return torch.tensor(handle.slot.norm(), dtype=dtype, device=handle.device)


def _mul(handles, given, factor):
    return _scale(handles, given, factor, lambda number: number, "mul_")


def _div(handles, given, factor):
    return _scale(handles, given, factor, _reciprocal, "div_")


def _scale(handles, given, factor, convert: Callable[[float], float], operation: str):
    """Multiply each handle by `convert` of its number; what the operation returns: `given`, of lists nothing."""
    is_list = isinstance(given, list | tuple)
    if len(handles) != (len(given) if is_list else 1) or (not is_list and given is not handles[0]):
        raise _refusal(operation, handles)
    factors = factor if isinstance(factor, list | tuple) else [factor] * len(handles)
    numbers = []
    for handle, one in zip(handles, factors, strict=True):
        if isinstance(one, torch.Tensor):
            if isinstance(one, GradHandle) or one.numel() != 1 or one.is_complex():
                raise _refusal(f"{operation} by a tensor of shape {tuple(one.shape)}", handles)
            one = handle.slot.number(one)
        numbers.append(convert(float(one)))
    for handle, number in zip(handles, numbers, strict=True):
        handle.slot.scale(number)
    return None if is_list else given


def _reciprocal(number: float) -> float:
    return 1.0 / number if number != 0 else math.copysign(math.inf, number)


def zero_(handles, given):
    is_list = isinstance(given, list | tuple)
    if len(handles) != (len(given) if is_list else 1):
        raise _refusal("zero_", handles)
    for handle in handles:
        handle.slot.zero_()
    return None if is_list else given


def _unscale(handles, given, found_inf, inverse_scale):
    """GradScaler's check and unscaling of one list; `found_inf` is the same on every rank. Collective."""
    if len(handles) != len(given):
        raise _refusal("_amp_foreach_non_finite_check_and_unscale_", handles)
    if not all([math.isfinite(handle.slot.norm()) for handle in handles]):
        found_inf.fill_(1.0)
    _mul(handles, given, inverse_scale)
    handles[0].slot.forget_scales()


def _detach(handles, given):
    return GradHandle(given, given.slot)


def _to_copy(handles, given, *, dtype=None, device=None, **layout):
    """`Module._apply` casts or moves a parameter and then its gradient; what became of the parameter is checked."""
    return GradHandle(given, given.slot, dtype, device)


def _accumulate(handles, given, other, alpha=1):
    """AccumulateGrad's in-place sum, where a backward reaches a parameter before it reaches the engine."""
    if not is_in_backward() or alpha != 1 or given is not handles[0]:
        raise _refusal("add_", handles)
    given.incoming = other if given.incoming is None else given.incoming + other
    return given


_ANSWERS: dict[Any, Callable] = {
    torch.ops.aten.linalg_vector_norm: _norm,
    torch.ops.aten.norm: _norm,
    torch.ops.aten._foreach_norm: _foreach_norm,
    torch.ops.aten.mul_: _mul,
    torch.ops.aten._foreach_mul_: _mul,
    torch.ops.aten.div_: _div,
    torch.ops.aten._foreach_div_: _div,
    torch.ops.aten.zero_: zero_,
    torch.ops.aten._foreach_zero_: zero_,
    torch.ops.aten._amp_foreach_non_finite_check_and_unscale_: _unscale,
    torch.ops.aten.detach: _detach,
    torch.ops.aten.alias: _detach,
    torch.ops.aten._to_copy: _to_copy,
    torch.ops.aten.add_: _accumulate,
}
