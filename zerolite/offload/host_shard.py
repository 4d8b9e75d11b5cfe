"""One bucket's owned range in host memory: gradient, master, parameter and states, and the commands that step them.

How a parameter is kept follows from its dtype. fp32 and fp64: stepped in place. bf16: its 16 bits, which are what goes
back to the device, beside the 16 bits that its fp32 master has more; together they are the master, exactly, in 4 bytes
instead of 6. The bf16 parameter is the nearest one to its master as on the device, but for exact ties (one in 65,536),
which round away from zero: with ties to even, 16 more bits could not tell the two masters apart that lie half-way.
fp16: an fp32 master beside it.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from zerolite_kernels.cpu import command as abi
from zerolite_kernels.cpu.command import PARTIAL_NUMEL, Command

from zerolite.config import LOW_PRECISION, master_dtype
from zerolite.offload.arena import Field
from zerolite.offload.host import Host
from zerolite.offload.states import State
from zerolite.runtime.cpu_kernels import GRADIENT_DTYPES
from zerolite.shards.layout import BucketLayout, Run

PARAMETER_KINDS = {
    torch.float32: abi.IN_PLACE_FP32,
    torch.float64: abi.IN_PLACE_FP64,
    torch.bfloat16: abi.SPLIT_BF16,
    torch.float16: abi.MASTER_FP16,
}
STATE_FORMATS = {"fp32": abi.STATES_FP32, "bf16": abi.STATES_BF16, "int8": abi.STATES_INT8}


class HostBucket:
    """The host side of one bucket. Tensors are (numel,), the owned range [start, stop) of the bucket."""

    def __init__(
        self,
        host: Host,
        layout: BucketLayout,
        start: int,
        stop: int,
        dtype: torch.dtype,
        gradient_dtype: torch.dtype | None,
    ):
        """gradient_dtype: None for a frozen bucket, which has a parameter and nothing else."""
        self.host, self.layout, self.dtype = host, layout, dtype
        self.start, self.stop = start, stop
        self.label = layout.name
        self.number = 0  # when the pool has done this many commands, all that was asked for is done
        self.parameter = host.allocate(self.numel, dtype)
        self.master: Field | None = None
        self.gradient: Field | None = None  # where a reduced gradient lands
        self.sum: Field | None = None  # fp32, made when a second gradient comes before the step
        if gradient_dtype is not None:
            # Kernels step fp64 on fp64 gradients; the copy down widens those of a narrower reduction.
            self.gradient = host.allocate(self.numel, torch.float64 if dtype == torch.float64 else gradient_dtype)
            if dtype in LOW_PRECISION:
                self.master = host.allocate(self.numel, torch.int16 if dtype == torch.bfloat16 else torch.float32)

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def wait(self) -> None:
        """Sleep until the workers have done everything that was asked for this bucket."""
        self.host.wait(self.number)

    def is_done(self) -> bool:
        return self.host.pool.is_done(self.number)

    # Values #

    def values(self) -> torch.Tensor:
        """The master: the memory itself where it is plain, else joined; `set_values` takes it back."""
        self.wait()
        if self.master is None:
            return self.parameter.values
        if self.dtype == torch.float16:
            return self.master.values
        return join_bf16(self.parameter.values, self.master.values)

    def set_values(self, values: torch.Tensor) -> None:
        """Take a master, and round it to the parameter."""
        self.wait()
        if self.dtype == torch.bfloat16 and self.master is not None:
            split_bf16(values.to("cpu", torch.float32), self.parameter.values, self.master.values)
            return
        for field in (self.parameter, self.master):
            if field is not None and field.values.data_ptr() != values.data_ptr():
                field.values.copy_(values)

    def state_bytes(self, names: Iterable[str]) -> int:
        """Host memory that states of these names take."""
        if self.host.states_fd >= 0:
            return 0
        widths = {"fp32": master_dtype(self.dtype).itemsize, "bf16": 2, "int8": 1 + 4 / abi.BLOCK_NUMEL}
        return int(len(tuple(names)) * self.numel * widths[self.state_format])

    @property
    def state_format(self) -> str:
        return "fp32" if self.dtype == torch.float64 else self.host.offload.states

    def make_states(self, names: Iterable[str]) -> dict[str, State]:
        """Zeros for an optimizer, which owns them; their memory serves the next one when it is gone."""
        dtype, piece_numel = master_dtype(self.dtype), self.layout.piece_numel
        return {name: State(self.host, name, self.numel, piece_numel, dtype, self.state_format) for name in names}

    # Commands #

    def command(
        self,
        op: int,
        run: Run,
        gradient: Field | None = None,
        states: Mapping[str, State] = MappingProxyType({}),
        **numbers: float,
    ) -> Command:
        """One command on a run of the bucket; `gradient` is what it reads, `numbers` the rule's."""
        piece_numel = self.layout.piece_numel
        piece_start = run.start // piece_numel * piece_numel
        index = piece_start - self.start  # of the piece's first element in the owned range
        gradient = gradient or self.gradient
        addresses = {}
        for name, state in states.items():
            addresses[name] = state.address(index // piece_numel)
            addresses[f"{name}_scale"] = state.scale_address(index // piece_numel)
        return Command(
            op=op,
            numel=piece_numel,
            first=run.start - piece_start,
            last=run.stop - piece_start,
            states=STATE_FORMATS[self.state_format],
            gradient_dtype=GRADIENT_DTYPES[gradient.values.dtype],
            parameter_kind=PARAMETER_KINDS[self.dtype],
            gradient=gradient.address(index),
            parameter=self.parameter.address(index),
            master=self.master.address(index) if self.master is not None else 0,
            position=piece_start,
            file=int(bool(states) and self.host.states_fd >= 0),
            **addresses,
            **numbers,
        )

    def accumulate(self, is_first: bool) -> None:
        """Have the landed gradient added into the fp32 sum, or stored as its first term."""
        if self.sum is None:
            needed = self.numel * torch.float32.itemsize
            self.host.check_memory(needed, f"accumulating gradients of {self.label}")
            self.sum = self.host.allocate(self.numel, torch.promote_types(self.gradient.values.dtype, torch.float32))
        commands = []
        for start in range(self.start, self.stop, self.layout.piece_numel):
            whole = Run(start, start + self.layout.piece_numel, None)
            command = self.command(abi.ACCUMULATE, whole, flags=abi.STORE if is_first else 0)
            command.parameter_kind = PARAMETER_KINDS[self.sum.values.dtype]
            command.parameter = self.sum.address(start - self.start)
            commands.append(command)
        self.submit(commands, "accumulating")

    def submit(self, commands: list[Command], label: str) -> None:
        """Hand commands to the workers and go on."""
        if commands:
            self.number = self.host.submit(commands, f"{label} {self.label}")

    def sums(self, op: int, runs: list[Run], gradient: Field, states=None, numbers=None) -> list[list[float]]:
        """Have NORM or PREPARE done and wait; for each run the fp64 entries of its partial blocks.

        states, numbers: of a rule, `numbers` for each run; NORM needs none.
        """
        width = 2 if op == abi.PREPARE else 1
        counts = [width * num_partials(run, self.layout.piece_numel) for run in runs]
        results = self.host.scratch(sum(counts))
        commands, offset = [], 0
        for run, count, extra in zip(runs, counts, numbers or [{}] * len(runs), strict=True):
            commands.append(self.command(op, run, gradient, states or {}, result=results.address(offset), **extra))
            offset += count
        self.submit(commands, "adding up squares of")
        self.wait()
        entries = results.values[: sum(counts)].tolist()
        ends = [sum(counts[: index + 1]) for index in range(len(counts))]
        return [entries[end - count : end] for end, count in zip(ends, counts, strict=True)]


def num_partials(run: Run, piece_numel: int) -> int:
    first, last = run.start % piece_numel, (run.stop - 1) % piece_numel
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
