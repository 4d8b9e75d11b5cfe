"""Every way into a unit's parameters other than by its outputs: saved tensors in backward, other modules' reads.

[Note: a saved parameter opens its unit]
An output of a unit announces its backward: a hook on the node that made it, hooks.py. Autograd may come in by another
way: a loss left on a module, an object that nobody can open, a view changed in place, whose node autograd replaces.
Whatever the way, a node reads parameters from what it saved. So while forwards run, saved tensors pass through `pack`,
which knows each by its storage, and a saved parameter gathers its unit when backward unpacks it. A prefetched buffer is
therefore never read before its gather is done. Hooks of the user's, and of activation checkpoints, are called too.

A custom Function may keep a parameter by itself: kept_parameters.py.

torch compares the versions of saved tensors only where no hook is: `unpack` compares them instead.

[Note: parameters read by another module]
A module reads its parameter as `self.weight`, an item of `_parameters`. Where another module's forward
does that (`blocks[0].weight`, a part of a unit called from outside it) the item gathers the unit first. Iterating over
`_parameters` gathers nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zerolite.engine import kept_parameters
from zerolite.engine.graph_task import is_in_backward
from zerolite.engine.trees import map_tree, tensors_of
from zerolite.errors import ZeroliteError
from zerolite.shards.bucket import Bucket, Unit
from zerolite.shards.dtensors import is_distributed
from zerolite.shards.states import ParameterState

if TYPE_CHECKING:
    from zerolite.engine.engine import Engine

NO_STORAGE = 0
SavedTensorHooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


class Entries:
    """Opens units whose parameters are read by a way that no hook on an output announces.

    Graphs hold it, and modules may hold graphs: it must not keep the engine alive.
    """

    def __init__(self, engine: Engine):
        self._engine = weakref.ref(engine)
        self._buckets: list[weakref.ref[Bucket]] = []
        self._by_storage: dict[int, int] = {}  # identity of a bucket's storage, gathered or NaN -> index in `_buckets`
        self._nan_storages: set[int] = set()
        self._hooks: SavedTensorHooks = (self.pack, self.unpack)

    def add(self, unit: Unit) -> None:
        """Watch the unit's buckets that are freed between uses."""
        buckets = [bucket for bucket in unit.buckets if not bucket.parameters.stays_unsharded]
        for bucket in buckets:
            nan = _storage_of(bucket.parameters.placeholder)
            self._by_storage[_storage_of(bucket.parameters.unsharded)] = len(self._buckets)
            self._by_storage[nan] = len(self._buckets)
            self._nan_storages.add(nan)
            self._buckets.append(weakref.ref(bucket))
            if any(map(is_distributed, bucket.parameters.tensors)):
                self._hooks = (self.pack_distributed, self.unpack)
        if buckets:
            kept_parameters.watch(self)
        if unit.is_root:
            return
        own = {id(parameter) for bucket in buckets for parameter in bucket.parameters.tensors}
        for module in unit.module.modules():
            if any(id(parameter) in own for parameter in module._parameters.values()):
                module._parameters = _Parameters(module._parameters, self, unit)

    def keep_outputs(self, output):
        """What a unit's forward returns, what lies in buffers that are freed copied: a bias to add later."""
        if not self._buckets or all(self.index_of(tensor) is None for tensor in tensors_of(output)):
            return output
        return map_tree(lambda tensor: tensor if self.index_of(tensor) is None else tensor.clone(), output)

    # Saved tensors #

    def is_transformed(self, unit: Unit) -> bool:
        """Whether a transform of torch.func is at work, which saves tensors where no hook can see them.

        Its backward reaches no parameter of the model. ValueError where a unit would have to be gathered or fetched.
        """
        if torch._C._functorch.peek_interpreter_stack() is None:
            return False
        called = f"the forward of {unit.name} is called under a transform of torch.func (grad, jvp, ...), and "
        if self._buckets:
            raise ValueError(
                f"{called}its parameters are freed before the transform reads them: shard with stage=2, or use "
                "torch.autograd"
            )
        if any(bucket.parameters.state is not ParameterState.UNSHARDED for bucket in unit.buckets):
            raise ValueError(f"{called}workers have stepped its parameters: call list(model.parameters()) before it")
        return True

    def watch(self) -> bool:
        """Have saved tensors pass through here from now on; False where they do already, or nothing is freed."""
        if not self._buckets:
            return False
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        hooks = self._hooks
        if outer is not None:
            if outer[0] is hooks[0] or isinstance(getattr(outer[0], "__self__", None), _Behind):
                return False
            behind = _Behind(self, outer)
            hooks = (behind.pack, behind.unpack)
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
        return True

    def unwatch(self) -> None:
        torch._C._autograd._pop_saved_tensors_default_hooks()

    def pack(self, tensor: torch.Tensor) -> Any:
        """Called for every saved tensor of every forward, so it is one Python call for most."""
        try:
            index = self._by_storage.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # as in _storage_of, without its call
            index = None
        version = tensor._version
        # An output must not be kept with its node, which would keep the output.
        kept = tensor if tensor.grad_fn is None else tensor.detach()
        if index is None:
            return kept if version == 0 else (kept, version)
        self.index_of(tensor)  # raises for one that reads as NaN
        return _SavedParameter(index, kept.detach(), version)

    def pack_distributed(self, tensor: torch.Tensor) -> Any:
        """`pack`, of a model with DTensors: those have a storage of their own, without memory."""
        if not is_distributed(tensor):
            return self.pack(tensor)
        index = self.index_of(tensor)
        kept, version = tensor if tensor.grad_fn is None else tensor.detach(), tensor._version
        return (kept, version) if index is None else _SavedParameter(index, kept.detach(), version)

    def unpack(self, packed: Any) -> torch.Tensor:
        kind = type(packed)
        if kind is _SavedParameter:
            self.open(packed.index)
            tensor, version = packed.saved, packed.version
        elif kind is tuple:
            tensor, version = packed
        else:
            tensor, version = packed, 0
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} "
                "instead"
            )
        return tensor

    def index_of(self, tensor: torch.Tensor) -> int | None:
        """Which watched bucket a tensor is a view of; ZeroliteError where it was read while that was sharded."""
        storage = _storage_of(tensor)
        index = self._by_storage.get(storage)
        if index is not None and storage in self._nan_storages:
            bucket = self._bucket(index)
            raise ZeroliteError(
                f"a parameter of {bucket.unit.name} ({bucket.layout.name}, shape {tuple(tensor.shape)}) was read while "
                "it is sharded, so what was computed is NaN: it was kept from before, or the unit was left since; read "
                "it from its module where it is used, or inside zerolite.full_params(model)"
            )
        return index

    def open(self, index: int) -> None:
        """Backward reads a saved parameter: gather its unit if nothing has. Collective then."""
        bucket = self._buckets[index]()
        if bucket is not None and bucket.parameters.state is ParameterState.UNSHARDED:
            return
        bucket, engine = self._bucket(index), self._engine()
        if engine is not None and is_in_backward():
            engine.enter(bucket.unit, by_saved_tensor=True)

    def open_kept(self, tensor: torch.Tensor) -> None:
        """Backward of a custom Function is about to read a tensor that it kept by itself. Collective, as `open`."""
        if isinstance(tensor, nn.Parameter):
            index = self._by_storage.get(_storage_of(tensor))  # it reads as NaN until its unit is open
        else:
            index = self.index_of(tensor)
        if index is not None:
            self.open(index)

    def read(self, unit: Unit) -> None:
        """A module's parameter is read by name: gather its unit inside another one's forward. Collective then."""
        engine = self._engine()
        if engine is None or not (engine.units[0].forward_depth > 0 or is_in_backward()):
            return  # outside of any computation it reads as NaN: shards/parameters.py
        if any(bucket.parameters.state is not ParameterState.UNSHARDED for bucket in unit.buckets):
            engine.enter(unit, by_saved_tensor=False)

    def _bucket(self, index: int) -> Bucket:
        bucket = self._buckets[index]()
        if bucket is None:
            raise ZeroliteError("backward of a sharded model that is gone: keep the model until its backward is done")
        return bucket


class _SavedParameter:
    """What autograd keeps of a view of a watched bucket."""

    __slots__ = ("index", "saved", "version")

    def __init__(self, index: int, saved: Any, version: int):
        self.index, self.saved, self.version = index, saved, version


class _Behind:
    """Saved tensors go through hooks that others have set (an activation checkpoint's, the user's), then open units."""

    def __init__(self, entries: Entries, outer: SavedTensorHooks):
        self.entries = entries
        self.outer_pack, self.outer_unpack = outer

    def pack(self, tensor: torch.Tensor) -> Any:
        index = self.entries.index_of(tensor)
        packed = self.outer_pack(tensor)
        return packed if index is None else _SavedParameter(index, packed, 0)

    def unpack(self, packed: Any) -> torch.Tensor:
        if type(packed) is not _SavedParameter:
            return self.outer_unpack(packed)
        tensor = self.outer_unpack(packed.saved)
        self.entries.open(packed.index)  # a recomputation inside has gathered, and perhaps freed, other units
        return tensor


class _Parameters(dict):
    """A module's `_parameters`: an item is readable inside any forward."""

    def __init__(self, parameters: dict[str, nn.Parameter | None], entries: Entries, unit: Unit):
        super().__init__(parameters)
        self.entries, self.unit = entries, unit

    def __getitem__(self, name: str):
        if not self.unit.forward_depth:
            self.entries.read(self.unit)
        return super().__getitem__(name)

    def __reduce__(self):
        return dict, (dict(self),)  # a copied or pickled module is plain torch's


def _storage_of(tensor: torch.Tensor) -> int:
    """A number of the tensor's memory; NO_STORAGE for sparse ones and wrappers: none of ours."""
    try:
        inner = tensor._local_tensor if type(tensor) is DTensor else tensor
        return inner.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return NO_STORAGE
