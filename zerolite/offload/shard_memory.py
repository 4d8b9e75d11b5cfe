"""One shard's memory on the host: gradient, master and parameter, and the commands to the workers that use it.

How a parameter is kept follows from its dtype. fp32 and fp64: stepped in place. bf16: its 16 bits, which are what goes
back to the device, beside the 16 bits that its fp32 master has more; together they are the master, exactly, in 4 bytes
instead of 6. The bf16 parameter is the nearest one to its master as on the device, but for exact ties (one in 65,536),
which round away from zero: with ties to even, 16 more bits could not tell the two masters apart that lie half-way.
fp16: an fp32 master beside it.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from zerolite_kernels.cpu import command as abi
from zerolite_kernels.cpu.command import PARTIAL_NUMEL, Command

from zerolite.config import LOW_PRECISION, master_dtype
from zerolite.offload.arena import SharedTensor
from zerolite.offload.host import Host
from zerolite.runtime import trace
from zerolite.runtime.cpu_kernels import GRADIENT_DTYPES
from zerolite.shards.grad_norm import add_up
from zerolite.shards.layout import Range
from zerolite.shards.shard import BucketSpec
from zerolite.shards.update import TwoPassRule, Update

if TYPE_CHECKING:
    from zerolite.offload.states import State

PARAMETER_KINDS = {
    torch.float32: abi.IN_PLACE_FP32,
    torch.float64: abi.IN_PLACE_FP64,
    torch.bfloat16: abi.SPLIT_BF16,
    torch.float16: abi.MASTER_FP16,
}
STATE_FORMATS = {"fp32": abi.STATES_FP32, "bf16": abi.STATES_BF16, "int8": abi.STATES_INT8}


class ShardMemory:
    """Tensors of one shard in the arena, each (numel,), the range that this rank owns of the bucket."""

    parameter: SharedTensor  # the parameters' dtype
    master: SharedTensor | None  # what a 16-bit parameter has not of its master
    gradient: SharedTensor  # where a reduced gradient arrives; a frozen bucket has none
    sum: SharedTensor | None  # fp32, made when a second gradient comes before the step

    def __init__(self, host: Host, spec: BucketSpec):
        self.host, self.spec = host, spec
        self.layout, self.range, self.dtype = spec.layout, spec.range, spec.dtype
        self.label = spec.layout.name
        self.fence = 0  # the pool's sequence number after this shard's last command; `wait` blocks until it has passed
        self.parameter = host.allocate(self.numel, self.dtype, is_copied=True)
        self.master = self.sum = None
        if spec.gradient_dtype is not None:
            # Kernels step fp64 on fp64 gradients; the D2H copy widens those of a narrower reduction.
            is_fp64 = self.dtype == torch.float64
            dtype = torch.float64 if is_fp64 else spec.gradient_dtype
            self.gradient = host.allocate(self.numel, dtype, is_copied=True)
            if self.dtype in LOW_PRECISION:
                self.master = host.allocate(self.numel, torch.int16 if self.dtype == torch.bfloat16 else torch.float32)

    @property
    def numel(self) -> int:
        return self.range.numel

    def wait(self) -> None:
        """Sleep until the workers have passed the fence; WorkerError where one cannot."""
        with trace.phase("worker step wait", self.spec.unit_name):
            self.host.wait(self.fence)

    # Values #

    def values(self) -> torch.Tensor:
        """The master: the memory itself where it is plain, else joined; `set_values` stores it. Waits."""
        self.wait()
        if self.master is None:
            return self.parameter.values
        if self.dtype == torch.float16:
            return self.master.values
        return join_bf16(self.parameter.values, self.master.values)

    def set_values(self, values: torch.Tensor) -> None:
        """Store a master, and round it to the parameter. Waits."""
        self.wait()
        if values.is_meta:  # a plan's: there is nothing to store
            return
        if self.dtype == torch.bfloat16 and self.master is not None:
            split_bf16(
                values.to(self.parameter.values.device, torch.float32), self.parameter.values, self.master.values
            )
            return
        for shared in (self.parameter, self.master):
            if shared is not None and shared.values.data_ptr() != values.data_ptr():
                shared.values.copy_(values)

    @property
    def state_format(self) -> str:
        return "fp32" if self.dtype == torch.float64 else self.host.offload.states

    def state_bytes(self, names: Iterable[str]) -> int:
        """Host memory that states of these names take."""
        if self.host.states_fd >= 0:
            return 0
        widths = {"fp32": master_dtype(self.dtype).itemsize, "bf16": 2, "int8": 1 + 4 / abi.BLOCK_NUMEL}
        return int(len(tuple(names)) * self.numel * widths[self.state_format])

    # Commands #

    def command(
        self,
        op: int,
        part: Range,
        gradient: SharedTensor,
        states: Mapping[str, "State"] = MappingProxyType({}),
        **numbers: float,
    ) -> Command:
        """One command on a part of one shard of the bucket; `gradient` is what it reads, `numbers` the rule's."""
        shard_numel = self.layout.shard_numel
        shard_start = part.start // shard_numel * shard_numel
        index = shard_start - self.range.start  # of the shard's first element in the owned range
        addresses = {}
        for name, state in states.items():
            addresses[name] = state.address(index // shard_numel)
            addresses[f"{name}_scale"] = state.scale_address(index // shard_numel)
        return Command(
            op=op,
            numel=shard_numel,
            first=part.start - shard_start,
            last=part.stop - shard_start,
            states=STATE_FORMATS[self.state_format],
            gradient_dtype=GRADIENT_DTYPES[gradient.values.dtype],
            parameter_kind=PARAMETER_KINDS[self.dtype],
            gradient=gradient.address(index),
            parameter=self.parameter.address(index),
            master=self.master.address(index) if self.master is not None else 0,
            position=shard_start,
            file=int(bool(states) and self.host.states_fd >= 0),
            **addresses,
            **numbers,
        )

    def accumulate(self, is_first: bool) -> None:
        """Have the workers add the gradient into the fp32 sum, or store it as its first term."""
        if self.sum is None:
            needed = self.numel * torch.float32.itemsize
            self.host.check_memory(needed, f"accumulating gradients of {self.label}")
            self.sum = self.host.allocate(self.numel, torch.promote_types(self.gradient.values.dtype, torch.float32))
        commands = []
        for shard in self.layout.shard_ranges(self.range):
            command = self.command(abi.ACCUMULATE, shard, self.gradient, flags=abi.STORE if is_first else 0)
            command.parameter_kind = PARAMETER_KINDS[self.sum.values.dtype]
            command.parameter = self.sum.address(shard.start - self.range.start)
            commands.append(command)
        self.submit(commands, "accumulating")

    def submit(self, commands: list[Command], label: str) -> None:
        """Hand commands to the workers and go on."""
        if commands:
            self.fence = self.host.submit(commands, f"{label} {self.label}")

    def sums(self, op: int, parts: Sequence[Range], gradient: SharedTensor, states=None, numbers=None):
        """Have NORM or PREPARE done and wait; for each part the list of fp64 entries of its partial blocks.

        states, numbers: of a rule, `numbers` for each part; NORM needs none.
        """
        width = 2 if op == abi.PREPARE else 1
        counts = [width * num_partials(part, self.layout.shard_numel) for part in parts]
        results = self.host.scratch(sum(counts))
        commands, offset = [], 0
        for part, count, extra in zip(parts, counts, numbers or [{}] * len(parts), strict=True):
            commands.append(self.command(op, part, gradient, states or {}, result=results.address(offset), **extra))
            offset += count
        self.submit(commands, "adding up squares of")
        self.wait()
        entries = results.values[: sum(counts)].tolist()
        ends = [sum(counts[: index + 1]) for index in range(len(counts))]
        return [entries[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def prepare(
        self,
        gradient: SharedTensor,
        states: Mapping[str, "State"],
        rule: TwoPassRule,
        updates: Sequence[Update],
        num_slots: int,
    ) -> torch.Tensor:
        """Have PREPARE done and wait; fp64 (world_size, num_slots, 2) as `Shard.prepare` gives it, on the host."""
        rows = torch.zeros(self.layout.world_size, num_slots, 2, dtype=torch.float64)
        numbers = [rule.numbers(update) for update in updates]
        sums = self.sums(abi.PREPARE, [update.range for update in updates], gradient, states, numbers)
        for update, entries in zip(updates, sums, strict=True):
            squares = torch.tensor([add_up(entries[0::2]), add_up(entries[1::2])], dtype=torch.float64)
            rows[update.range.start // self.layout.shard_numel, update.slot] += squares
        return rows


def num_partials(part: Range, shard_numel: int) -> int:
    first, last = part.start % shard_numel, (part.stop - 1) % shard_numel
    return last // PARTIAL_NUMEL - first // PARTIAL_NUMEL + 1


def join_bf16(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """fp32 whose nearest bf16, ties away from zero, is `high`, and whose low 16 bits are `low` (int16)."""
    return high.view(torch.int16).to(torch.int32).mul_(1 << 16).add_(low).view(torch.float32)


def split_bf16(values: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """The inverse of `join_bf16`, into `high` and `low`."""
    bits = values.view(torch.int32)
    low.copy_(((bits & 0xFFFF) ^ 0x8000) - 0x8000)
    high.view(torch.int16).copy_((bits - low) >> 16)


def round_bf16(values: torch.Tensor) -> torch.Tensor:
    """The `high` of `split_bf16`: nearest bf16, ties away from zero; of fp32 on any device."""
    return ((values.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` in the parameters' dtype as a step on the host rounds them."""
    if dtype == torch.bfloat16 and values.dtype == torch.float32 and not values.is_meta:
        return round_bf16(values)
    return values.to(dtype)
