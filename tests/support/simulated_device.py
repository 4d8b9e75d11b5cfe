"""A third device beside Cpu and Cuda, whose streams run nothing and tell an `Order` what they would run: order.py.

One process plays several ranks: a `MirroredGroup`'s peers hold the same values as this rank, so collectives need no
transport, and run through the engine's own `NcclGroup`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from mutants import replaced
from order import HOST, WORKERS, Access, Clock, Order
from torch.utils._python_dispatch import TorchDispatchMode
from zerolite_kernels.cpu import command as abi


class SimulatedDevice:
    """The methods of `zerolite.runtime.device.Cuda`, on an `Order`."""

    backend, bound = "nccl", None
    chunk_numel = 1024

    def __init__(self, order: Order):
        self.order = order
        self.device = torch.device("cpu")
        self.is_copying = False
        self.pinned_bytes = 0
        self._num_streams = 0

    def select(self) -> None:
        pass

    def new_stream(self) -> str:
        self._num_streams += 1
        return f"stream {self._num_streams}"

    @contextlib.contextmanager
    def on(self, stream: str, after_current: bool = False):
        before = self.order.stream
        if after_current:
            self.order.wait(stream, self.order.record())
        self.order.stream = stream
        try:
            yield
        finally:
            self.order.stream = before

    def record(self) -> Clock:
        return self.order.record()

    def wait(self, event: Clock) -> None:
        self.order.wait(self.order.stream, event)

    def synchronize(self, event: Clock) -> None:
        self.order.wait(HOST, event)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.is_copying = True
        try:
            target.copy_(source)
        finally:
            self.is_copying = False

    def pin(self, memory: torch.Tensor) -> bool:
        self.pinned_bytes += memory.nbytes
        return True

    def unpin(self, memories: list[torch.Tensor]) -> None:
        pass


class Watch(TorchDispatchMode):
    """Attributes every torch operation to the current stream, or to the host where it works on the arena alone.

    An operation on both is a copy that the host waits for, unless `SimulatedDevice.copy` makes it.
    """

    def __init__(self, device: SimulatedDevice):
        super().__init__()
        self.device, self.order = device, device.order
        self.is_quiet = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.is_quiet:
            return result
        if func is torch.ops.aten.record_stream.default:
            raise AssertionError("record_stream: the engine names streams through its device")
        read, written = self._operands(func, args, kwargs or {})
        outputs = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return result  # a view
        inputs = [*read, *written]
        on_host = [self.order.is_host(tensor) for tensor in inputs]
        timeline = HOST if inputs and all(on_host) else self.order.stream
        what = func.overloadpacket.__name__
        tick = self.order.tick(timeline)
        for tensor in read:
            self.order.access(timeline, tick, tensor, False, what)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            if timeline == HOST and tensor.untyped_storage()._cdata not in known:
                self.order.memory_of(tensor.untyped_storage(), None)
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
        for tensor in [*written, *new]:
            self.order.access(timeline, tick, tensor, True, what)
        if any(on_host) and timeline != HOST and not self.device.is_copying:
            self.order.wait(HOST, self.order.record(timeline))
        return result

    @staticmethod
    def _operands(func, args, kwargs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        read, written = [], []
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            (written if is_write else read).extend(tensors)
        return read, written


class MirroredGroup(NamedTuple):
    """A process group of `size` ranks that all hold what this one, rank 0, holds."""

    name: str
    size: int


class MirroredDist:
    """What `zerolite.runtime.collectives` calls of torch.distributed, on `MirroredGroup`s as NCCL orders it."""

    ReduceOp = torch.distributed.ReduceOp
    get_rank = staticmethod(lambda group=None: 0)
    get_world_size = staticmethod(lambda group=None: group.size)
    is_initialized = staticmethod(lambda: False)

    def __init__(self, watch: Watch):
        self.watch, self.order = watch, watch.order

    def _collective(self, group, what, async_op, read, written, numbers: Callable[[], None]):
        order = self.order
        timeline = group.name if async_op else order.stream  # torch >= 2.8: without `async_op` on the current stream
        order.wait(timeline, order.record())
        tick = order.tick(timeline)
        order.access(timeline, tick, read, False, what)
        order.access(timeline, tick, written, True, what)
        self.watch.is_quiet = True
        try:
            with torch.no_grad():
                numbers()
        finally:
            self.watch.is_quiet = False
        return Work(order, order.record(timeline))

    def reduce_scatter_tensor(self, out, full, op, group, async_op=False):
        factor = 1 if op == self.ReduceOp.AVG else group.size

        def numbers() -> None:
            out.copy_(full[: out.numel()] * factor)

        return self._collective(group, "reduce-scatter", async_op, full, out, numbers)

    def all_gather_into_tensor(self, full, shard, group, async_op=False):
        def numbers() -> None:
            full.view(group.size, -1).copy_(shard.clone().expand(group.size, -1))

        return self._collective(group, "all-gather", async_op, shard, full, numbers)

    def all_reduce(self, tensor, group, op=torch.distributed.ReduceOp.SUM):
        factor = group.size if op == self.ReduceOp.SUM else 1
        self._collective(group, "all-reduce", False, tensor, tensor, lambda: tensor.mul_(factor))

    def broadcast(self, tensor, group, group_src):
        self._collective(group, "broadcast", False, tensor, tensor, lambda: None)


class Work(NamedTuple):
    order: Order
    done: Clock

    def wait(self) -> None:
        """Order the current stream, not the host, as NCCL's does."""
        self.order.wait(self.order.stream, self.done)


class Workers:
    """What the commands to one pool read and write; their timeline follows the order of submission."""

    def __init__(self, order: Order):
        self.order = order
        self.tensors: list = []  # SharedTensors of the arena
        self.done: dict[int, Clock] = {}  # by the number to wait for

    def allocated(self, shared) -> None:
        self.order.memory_of(shared.values.untyped_storage(), None)
        self.tensors.append(shared)

    def submitted(self, commands, number: int) -> None:
        for command in commands:
            tick = self.order.tick(WORKERS)
            for name, is_write in _OPERANDS[command.op].items():
                self._access(command, name, tick, is_write)
        self.done[number] = self.order.record(WORKERS)

    def waited(self, number: int) -> None:
        behind = [event for done, event in self.done.items() if done >= number]
        if behind:
            self.order.wait(HOST, behind[0])

    def _access(self, command, name: str, tick: int, is_write: bool) -> None:
        address = getattr(command, name)
        if address == 0 and name not in ("gradient", "parameter"):
            return
        (shared,) = [s for s in self.tensors if s.offset <= address < s.offset + max(s.nbytes, 1)]
        base, size = address - shared.offset, shared.values.element_size()
        start, stop = base + command.first * size, base + command.last * size
        if command.op == abi.FILL:
            start, stop = 0, shared.nbytes
        elif name in ("result", "exp_avg_scale", "exp_avg_sq_scale"):  # an entry a block
            start, stop = base, shared.nbytes
        memory = self.order.memory_of(shared.values.untyped_storage(), None)
        if start < stop:
            self.order.access_bytes(memory, Access(WORKERS, tick, start, stop, is_write, _OPS[command.op]))


_OPS = {abi.STEP: "step", abi.PREPARE: "prepare", abi.ACCUMULATE: "accumulate", abi.NORM: "norm", abi.FILL: "fill"}
_STATES = dict.fromkeys(("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"), True)
_OPERANDS = {  # op -> operand: is it written
    abi.STEP: {"gradient": False, "parameter": True, "master": True, **_STATES},
    abi.PREPARE: {"gradient": False, "parameter": False, "master": False, "result": True, **_STATES},
    abi.ACCUMULATE: {"gradient": False, "parameter": True},
    abi.NORM: {"gradient": False, "result": True},
    abi.FILL: {"gradient": True},
}


@contextlib.contextmanager
def simulated(shards: int = 1, replicas: int = 1) -> Iterator[Order]:
    """Models sharded inside lie on a `SimulatedDevice`, on rank 0 of a mesh of mirrored ranks; yields the checker."""
    import zerolite.api
    from zerolite.offload.arena import Arena
    from zerolite.offload.pool import Pool
    from zerolite.runtime import collectives, cpu_kernels
    from zerolite.runtime import device as devices
    from zerolite.runtime.mesh import RankMesh

    order = Order()
    device = SimulatedDevice(order)
    watch, workers = Watch(device), Workers(order)

    def group(name: str, size: int) -> collectives.Group:
        return collectives.NcclGroup(MirroredGroup(name, size)) if size > 1 else collectives.Group()  # type: ignore[arg-type]

    def mesh_of(mesh, torch_device, tensor=(), norm_over=()) -> RankMesh:
        return RankMesh(group("NCCL of shards", shards), group("NCCL of replicas", replicas))

    allocate, submit, wait = Arena.allocate, Pool.submit, Pool.wait

    def watched_allocate(arena, *args):
        workers.allocated(shared := allocate(arena, *args))
        return shared

    def watched_submit(pool, commands, *args, **keywords):
        number = submit(pool, commands, *args, **keywords)
        workers.submitted(commands, number)
        return number

    def watched_wait(pool, number):
        wait(pool, number)
        workers.waited(number)

    def resize(storage, nbytes):
        order.resize(storage, nbytes)
        return torch._C.StorageBase.resize_(storage, nbytes)

    with contextlib.ExitStack() as stack:
        for owner, name, value in [
            (devices, "of", lambda torch_device: device),
            (zerolite.api, "mesh_of", mesh_of),
            (collectives, "dist", MirroredDist(watch)),
            (cpu_kernels, "on_cpu", lambda *tensors: False),  # the device's rules and norms
            (Arena, "allocate", watched_allocate),
            (Pool, "submit", watched_submit),
            (Pool, "wait", watched_wait),
            (torch.UntypedStorage, "resize_", resize),
        ]:
            stack.enter_context(replaced(owner, name, value))
        with watch:
            yield order
