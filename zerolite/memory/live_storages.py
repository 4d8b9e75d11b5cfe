"""Bytes of the storages that torch operations make and that somebody still refers to, counted as they come and go.

On the CPU and under fake tensors this is what an allocator's counter is on a GPU, without rounding: every storage once,
however many views it has, from the operation that made it until its last reference is gone. It sees what operations
return. Scratch inside an operation, memory made before, and mappings (the arena of offload) are not seen.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class LiveStorages(TorchDispatchMode):
    """A mode: inside, every storage that an operation returns is counted until it is freed."""

    current_bytes: int  # alive now

    def __init__(self):
        super().__init__()
        self.current_bytes = self._peak_bytes = 0
        self._sizes: dict[int, int] = {}
        self._ends: dict[int, weakref.ref] = {}  # whose callbacks forget

    def take_peak(self) -> int:
        """The most bytes that were alive at once since the last call, which this call begins anew."""
        peak, self._peak_bytes = self._peak_bytes, self.current_bytes
        return peak

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it is counted, from now until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = nbytes = storage.nbytes()
            self.current_bytes += nbytes
            self._peak_bytes = max(self._peak_bytes, self.current_bytes)
            self._ends[key] = weakref.ref(storage, partial(self._forget, key))

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage no more, and as if it had never been."""
        key = tensor.untyped_storage()._cdata
        if key in self._sizes:
            nbytes, self._sizes[key] = self._sizes[key], 0
            self.current_bytes -= nbytes
            self._peak_bytes = max(self._peak_bytes - nbytes, self.current_bytes)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A counted storage has another size now: `resize_` of a storage is no operation, so its caller tells."""
        if storage._cdata in self._sizes:
            self._resize(storage._cdata, storage.nbytes())

    def _resize(self, key: int, nbytes: int) -> None:
        self.current_bytes += nbytes - self._sizes[key]
        self._sizes[key] = nbytes
        self._peak_bytes = max(self._peak_bytes, self.current_bytes)

    def clear(self) -> None:
        """Count nothing of what is alive any more."""
        self._ends.clear()
        self._sizes.clear()
        self.current_bytes = self._peak_bytes = 0

    def _forget(self, key: int, _: weakref.ref) -> None:
        self.current_bytes -= self._sizes.pop(key)
        del self._ends[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs) if kwargs else func(*args)
        makes = _MAKES.get(func)
        if makes is None:
            makes = _MAKES[func] = _may_make(func)
        if not makes:
            return result
        # What is not declared a view may be one all the same, of memory that somebody else made, here or before.
        sizes = self._sizes
        if type(result) is torch.Tensor:
            made = [result] if result.untyped_storage()._cdata not in sizes else ()
        else:
            made = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in sizes]
        if made:
            given = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
            if kwargs:
                given |= {tensor.untyped_storage()._cdata for tensor in _tensors(tuple(kwargs.values()))}
            for tensor in made:
                if tensor.untyped_storage()._cdata not in given:
                    self.add(tensor)
        return result


# Whether an operation may return memory that it has made; decided once for each, since every one of a step is asked.
_MAKES: dict[Any, bool] = {}


def _may_make(func: Any) -> bool:
    """False where all that it returns is declared to be a view of its arguments, or what it has written in place."""
    schema = getattr(func, "_schema", None)
    if schema is None or schema.name.endswith(("resize_", "set_")):  # of a higher order; it takes other memory
        return True
    return any(value.alias_info is None for value in schema.returns)


class LiveStoragesAndFlops(LiveStorages):
    """`LiveStorages` that counts what is computed, too."""

    flops: int  # of matrix products and attention since the start, a multiply-add as two

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.flops += _flops(func, args, kwargs or {}, result)
        return result


Resize = Callable[[torch.UntypedStorage, int], None]


@contextmanager
def resizes_through(resize: Callable[[Resize, torch.UntypedStorage, int], None]) -> Iterator[None]:
    """Inside, whoever resizes a storage calls `resize(torch's own, storage, nbytes)`, which has to do it.

    The engine gathers and frees units by that; it is no operation, so no mode sees it.
    """
    before = vars(torch.UntypedStorage).get("resize_")  # None: it is inherited
    own = torch.UntypedStorage.resize_
    torch.UntypedStorage.resize_ = lambda storage, nbytes: resize(own, storage, nbytes)
    try:
        yield
    finally:
        if before is None:
            del torch.UntypedStorage.resize_
        else:
            torch.UntypedStorage.resize_ = before


def _tensors(value: Any) -> list[torch.Tensor]:
    """Those of an operation's arguments or results, which are tensors, and lists and tuples of them."""
    if isinstance(value, torch.Tensor):
        return [value]
    found: list[torch.Tensor] = []
    for part in value if isinstance(value, list | tuple) else ():
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, list | tuple):
            found += _tensors(part)
    return found


def _flops(func, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """As torch.utils.flop_counter counts, with the CPU's attention, which it has not."""
    packet = func._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=result)
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    return 0
