"""Collectives over flat tensors along one mesh dimension, with the transport chosen once.

NCCL runs its own reduce-scatter and all-gather. gloo's are slow (100 MiB fp32, two ranks: reduce-scatter 115 ms,
an exchange of shards by isend/irecv plus a sum 30 ms), so on the CPU ranks exchange shards and sum them in rank
order, which also makes the sum independent of who owns the shard.

Every method but the properties is collective: every rank of the group must call it, in the same order.
"""

import contextlib
import struct
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
import torch.distributed as dist

from zerolite.config import LOW_PRECISION
from zerolite.errors import ZeroliteError
from zerolite.runtime import abort
from zerolite.runtime import device as devices
from zerolite.runtime.failures import OutOfStepError, PeerError, failure_of
from zerolite.runtime.long_waits import Waits

HEADER = struct.Struct("<QI20s96s")  # a message's bytes, hash of its label, dtype, as much of the label as fits
# A tag of gloo has 31 bits: a hash, a sequence number, and one bit that tells header and payload apart.
SEQUENCE_BITS = 10  # a rank has far fewer exchanges in flight
# A model may be dropped in the middle of a backward. A peer may still wait for what it sent, so the last exchanges are
# kept; those that were waited for are empty.
_last: deque["Pending"] = deque(maxlen=64)
# What nobody received of it must match nothing of the next one's: how many models were sharded over a process group.
_generations: "weakref.WeakKeyDictionary[dist.ProcessGroup, int]" = weakref.WeakKeyDictionary()
# What NCCL and gloo both know; other dtypes move as bytes.
TRANSPORTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
FEW_NUMBERS = "the exchange of a few numbers"
CHUNK_NUMEL = 128 * 1024  # three of them in fp32 lie in a core's second-level cache


class Pending:
    """A collective in flight; it keeps its tensors alive until `wait`."""

    def __init__(self, steps=(), keepalive=(), label: str = ""):
        self.steps = steps  # callables that wait for and finish it, in order
        self.keepalive = keepalive
        self.label = label

    def wait(self) -> None:
        """Order the current stream (CUDA) or this thread (CPU) after the collective. Idempotent."""
        Waits.count += 1
        Waits.label = self.label
        try:
            for step in self.steps:
                step()
        except RuntimeError as error:
            Waits.label = None
            failure = error if isinstance(error, ZeroliteError) else failure_of(self.label, error)
            self.steps = (partial(_raise, failure),)  # gloo would wait a second time for what came the first time
            raise failure from error
        Waits.label = None
        self.steps, self.keepalive = (), ()


def _raise(error: ZeroliteError) -> None:
    raise error


class Group:
    """A group of one: every collective is the identity."""

    rank = 0
    size = 1

    def reduce_scatter(self, full: torch.Tensor, out: torch.Tensor, divisor: int, label: str) -> Pending:
        """out (shard_numel,) = sum over ranks of this rank's shard of `full` (size * shard_numel,) / divisor.

        `out` may be this rank's shard of `full` itself. `label` says in an error what was going on.
        """
        if out.data_ptr() != full.data_ptr():
            out.copy_(full)
        if divisor != 1:
            out.div_(divisor)
        return Pending()

    def all_gather(self, full: torch.Tensor, shard: torch.Tensor, label: str) -> Pending:
        """full (size * shard_numel,) = every rank's `shard`; `shard` may be this rank's part of `full` itself."""
        if shard.data_ptr() != full.data_ptr():
            full.copy_(shard)
        return Pending()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum `tensor` over ranks, in place, the same bits on every rank."""

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0's values on every rank, in place."""

    def all_gather_scalars(self, scalars: torch.Tensor) -> torch.Tensor:
        """Every rank's few numbers `scalars` (n,) as rows (size, n), on the host. WorkerError where a rank failed."""
        return scalars.unsqueeze(0).cpu()


class NcclGroup(Group):
    """Collectives as NCCL has them, on NCCL's own stream; `wait` orders the current stream after them."""

    def __init__(self, process_group: dist.ProcessGroup):
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)

    def reduce_scatter(self, full, out, divisor, label):
        # NCCL's AVG multiplies each term by 1 / size before it adds them. That rounds once more than a division of the
        # sum, but for powers of two. fp16 has no room for a sum.
        has_room = full.dtype != torch.float16 and self.size & (self.size - 1) != 0
        op = dist.ReduceOp.AVG if divisor == self.size and not has_room else dist.ReduceOp.SUM
        work = dist.reduce_scatter_tensor(out, full, op=op, group=self.process_group, async_op=True)
        Waits.work, Waits.work_label = work, label
        if op == dist.ReduceOp.AVG:
            return Pending((work.wait,), (full, out), label)
        return Pending((work.wait, lambda: out.div_(divisor)), (full, out), label)

    def all_gather(self, full, shard, label):
        if full.dtype not in TRANSPORTED:
            full, shard = full.view(torch.uint8), shard.view(torch.uint8)
        work = dist.all_gather_into_tensor(full, shard, group=self.process_group, async_op=True)
        Waits.work, Waits.work_label = work, label
        return Pending((work.wait,), (full, shard), label)

    def all_reduce(self, tensor):
        dist.all_reduce(tensor, group=self.process_group)

    def broadcast(self, tensor):
        with as_bytes(tensor) as sent:
            dist.broadcast(sent, group=self.process_group, group_src=0)

    def all_gather_scalars(self, scalars):
        rows = scalars.new_empty(self.size, scalars.numel())
        dist.all_gather_into_tensor(rows.view(-1), scalars, group=self.process_group)
        Waits.count, Waits.label = Waits.count + 1, FEW_NUMBERS
        rows = rows.cpu()  # the host waits here
        Waits.label = None
        if abort.has_failed():  # the group was aborted: that ends the wait, with whatever lies there
            raise failure_of(FEW_NUMBERS, RuntimeError("the process group was ended"))
        return rows


class ExchangeGroup(Group):
    """gloo: shards travel by isend/irecv; sums run on the waiting thread in rank order, a cache-sized chunk a time."""

    def __init__(self, process_group: dist.ProcessGroup):
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        self.peers = [peer for peer in range(self.size) if peer != self.rank]
        self.count = 0
        self.generation = _generations.get(process_group, 0) + 1 & (1 << 30 - SEQUENCE_BITS) - 1
        _generations[process_group] = self.generation
        self.world_ranks = dist.get_process_group_ranks(process_group)

    def _exchange(
        self, sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor], label: str, *then
    ) -> Pending:
        """Send tensors to every peer and receive theirs, each behind a header; `then`: what follows the last receive.

        gloo ends the process when a message is of another size than expected. Each message's tag has a sequence number
        and a hash of its label, size and dtype, so messages of ranks that are out of step never match. The header, of
        one size always and tagged by generation and sequence number alone, carries all three: a mismatch raises at once
        instead of hanging.
        """
        if abort.has_failed():  # this rank computed while its groups were ended
            raise failure_of(label, RuntimeError("another rank failed"))
        self.count = (self.count + 1) % (1 << SEQUENCE_BITS)
        sent = next(iter(sends.values()))
        header, content_hash = _header(label, sent.nbytes, str(sent.dtype))
        headers = {peer: torch.empty_like(header) for peer in self.peers}
        try:
            tag = self.generation << SEQUENCE_BITS + 1 | 2 * self.count
            header_works = self._post({peer: header for peer in self.peers}, headers, tag)
            tag = (content_hash ^ self.generation) << SEQUENCE_BITS + 1 | 2 * self.count + 1
            works = self._post(sends, receives, tag)
        except RuntimeError as error:
            raise failure_of(label, error) from error

        def check() -> None:
            for peer, received in headers.items():
                if not torch.equal(received, header):
                    raise OutOfStepError(f"rank {peer} of the group is at {_difference(received, header)}")

        _last.append(Pending([*header_works, check, *works, *then], (header, sends, receives), label))
        return _last[-1]

    def _post(self, sends, receives, tag: int) -> list[Callable[[], None]]:
        """Start to receive from every peer and to send to it; what waits for each."""
        group = self.process_group
        waits: list[Callable[[], None]] = []
        peer = self.rank
        try:
            for peer in self.peers:
                work = dist.irecv(receives[peer], group=group, group_src=peer, tag=tag)
                waits.append(partial(self._wait, peer, work))
            for peer in self.peers:
                work = dist.isend(sends[peer], group=group, group_dst=peer, tag=tag)
                waits.append(partial(self._wait, peer, work))
        except RuntimeError as error:  # it has closed its connection already
            raise PeerError(self.world_ranks[peer], error) from error
        return waits

    def _wait(self, peer: int, work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise PeerError(self.world_ranks[peer], error) from error

    def reduce_scatter(self, full, out, divisor, label):
        if full.numel() == 0:
            return Pending()
        shards = dict(enumerate(full.view(self.size, -1).unbind()))
        received = {peer: torch.empty_like(shards[peer]) for peer in self.peers}
        terms = [received.get(rank, shards[rank]) for rank in range(self.size)]
        return self._exchange(shards, received, label, lambda: sum_in_rank_order(terms, out, divisor))

    def all_gather(self, full, shard, label):
        if full.numel() == 0:
            return Pending()
        if full.dtype not in TRANSPORTED:
            full, shard = full.view(torch.uint8), shard.view(torch.uint8)
        shards = dict(enumerate(full.view(self.size, -1).unbind()))
        pending = self._exchange({peer: shard for peer in self.peers}, shards, label)
        if shard.data_ptr() != shards[self.rank].data_ptr():
            shards[self.rank].copy_(shard)
        return pending

    def all_reduce(self, tensor):
        received = {peer: torch.empty_like(tensor) for peer in self.peers}
        sent = tensor.clone()
        self._exchange({peer: sent for peer in self.peers}, received, "adding up over replicas").wait()
        sum_in_rank_order([received.get(rank, sent) for rank in range(self.size)], tensor, 1)

    def broadcast(self, tensor):
        """Its own message has no header, so the size goes ahead in the label of a small one."""
        label = f"broadcasting {tensor.nbytes:,} bytes of {tensor.dtype}"
        self._exchange(
            {peer: torch.zeros(1) for peer in self.peers}, {peer: torch.zeros(1) for peer in self.peers}, label
        ).wait()
        with as_bytes(tensor) as sent:
            dist.broadcast(sent, group=self.process_group, group_src=0)

    def all_gather_scalars(self, scalars):
        rows = scalars.new_empty(self.size * scalars.numel())
        self.all_gather(rows, scalars, FEW_NUMBERS).wait()
        return rows.view(self.size, -1)


@lru_cache(maxsize=1024)
def _header(label: str, num_bytes: int, dtype: str) -> tuple[torch.Tensor, int]:
    """What announces a message, (HEADER.size,) uint8, to be read only; and the hash of it that is in a tag."""
    name = label.encode()
    content = HEADER.pack(num_bytes, zlib.crc32(name), dtype.removeprefix("torch.").encode(), name[:96])
    return torch.frombuffer(bytearray(content), dtype=torch.uint8), zlib.crc32(content) >> SEQUENCE_BITS + 2


def _difference(received: torch.Tensor, header: torch.Tensor) -> str:
    """What a peer's header announced and this rank's does, in words."""
    said = []
    for content in (received, header):
        num_bytes, _, dtype, label = HEADER.unpack(content.numpy().tobytes())
        text, kind = (part.rstrip(b"\0").decode(errors="replace") for part in (label, dtype))
        said.append(f"{text}, {num_bytes:,} bytes of {kind}")
    return f"{said[0]}; this rank is at {said[1]}"


@contextlib.contextmanager
def as_bytes(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Inside, a tensor that every transport can write; what was written is in `tensor` afterwards."""
    if tensor.dtype in TRANSPORTED and tensor.is_contiguous():
        yield tensor
        return
    flat = tensor.detach().contiguous().view(-1)
    yield flat.view(torch.uint8)
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))


def sum_in_rank_order(terms: list[torch.Tensor], out: torch.Tensor, divisor: int) -> None:
    """out = sum(terms) / divisor, added in list order, 16-bit terms in fp32; `out` may be one of the terms."""
    for start in range(0, out.numel(), CHUNK_NUMEL):
        chunks = [term[start : start + CHUNK_NUMEL] for term in terms]
        target = out[start : start + CHUNK_NUMEL]
        if len(chunks) == 2 and target.dtype not in LOW_PRECISION:
            total = torch.add(chunks[0], chunks[1], out=target)
        else:
            total = chunks[0].to(torch.float32) if target.dtype in LOW_PRECISION else chunks[0].clone()
            for chunk in chunks[1:]:
                total.add_(chunk)
        if divisor != 1:
            total.div_(divisor)
        if total is not target:
            target.copy_(total)


def group_of(process_group: dist.ProcessGroup | None, device: torch.device) -> Group:
    """The collectives of a process group for tensors on `device`; None or a group of one needs no transport."""
    if process_group is None or dist.get_world_size(process_group) == 1:
        return Group()
    transports = {"nccl": NcclGroup, "gloo": ExchangeGroup}
    return transports[devices.of(device).backend](process_group)
