"""One optimizer step on the host, bf16 gradient in and bf16 parameter out: how far from what memory allows?

zerolite's host kernels beside torch (fused, foreach), DeepSpeed's CPU optimizers (where installed) and plain torch for
LAMB, on one flat tensor. What steps in fp32 there has to cast: gradient to fp32, step, parameter to bf16. "+ clip" adds
the norm of the gradient and its scaling, on both sides.

Contenders take turns, round by round. Just before and after each sample of zerolite's, the ceiling: a loop that reads
and writes the same streams in place and computes next to nothing (ceiling.c). Layouts: processes x threads, each on a
core of its own; two processes hold half of the elements each.

    python benchmarks/host/cpu_optimizer.py                                   # all of it, about half an hour
    python benchmarks/host/cpu_optimizer.py --sizes 1 --rounds 3 --groups adam --layouts 2x1
    PYTHONPATH=kernels python benchmarks/host/cpu_optimizer.py                # another environment, with DeepSpeed
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all benchmarks share

import harness
import torch
import torch.distributed as dist
from zerolite_kernels import cpu
from zerolite_kernels.cpu import command as abi
from zerolite_kernels.cpu.command import Command

LR, BETA1, BETA2, EPS, DECAY, MAX_NORM = 1e-5, 0.9, 0.999, 1e-8, 0.01, 1.0
LAYOUTS = {"1x1": (1, 1), "1x2": (1, 2), "2x1": (2, 1)}

Step = Callable[[], None]


# --- contenders: each builds a step of `numel` elements --------------------------------------------------------------


class Low:
    """What all contenders share: the gradient and the parameter in bf16, and zeros of their size."""

    def __init__(self, numel: int):
        self.numel = numel
        self.zeros = torch.zeros(numel, dtype=torch.bfloat16)
        self.gradient = (torch.randn(numel) * 1e-3).bfloat16()
        self.parameter = (torch.randn(numel) * 2e-2).bfloat16()


class Pinned:
    """Threads on cores of their own, and a C function called on each one's share of the elements."""

    def __init__(self, cores: list[int]):
        self.cores = cores
        waiting = iter(cores)
        self.pool = ThreadPoolExecutor(len(cores), initializer=lambda: os.sched_setaffinity(0, {next(waiting)}))
        list(self.pool.map(time.sleep, [0.05] * len(cores)))  # every thread has started

    def run(self, numel: int, function: Callable[[int, int], None]) -> None:
        if len(self.cores) == 1:
            return function(0, numel)
        part = -(-numel // len(self.cores) // abi.PARTIAL_NUMEL) * abi.PARTIAL_NUMEL
        cuts = [*range(0, numel, part), numel]
        list(self.pool.map(function, cuts, cuts[1:]))


def on_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in mapped pages, from the start of one, as the arena has its fields."""
    memory = mmap.mmap(-1, max(tensor.nbytes, 8))
    return torch.frombuffer(memory, dtype=tensor.dtype, count=max(tensor.numel(), 1))[: tensor.numel()].copy_(tensor)


class HostKernels:
    """A step of zerolite's kernels, and the ceiling of the same streams."""

    def __init__(
        self, low: Low, pinned: Pinned, rule: int, states: int, kind: int, clips: bool, ceiling: Callable | None
    ):
        self.low, self.pinned, self.clips, self.ceiling_loop = low, pinned, clips, ceiling  # ceiling: None is none
        self.library, self.step_number = cpu.load(), 0
        numel, state = low.numel, {0: torch.float32, 1: torch.bfloat16, 2: torch.int8}[states]
        is_split = kind == abi.SPLIT_BF16
        self.tensors = {
            "gradient": low.gradient,
            "parameter": low.parameter.clone(),
            "master": torch.zeros(numel, dtype=torch.int16) if is_split else low.parameter.float(),
            "exp_avg": torch.zeros(numel, dtype=state),
            "exp_avg_scale": torch.zeros(numel // abi.BLOCK_NUMEL + 1),
            "exp_avg_sq": torch.zeros(numel if rule != abi.LION else 0, dtype=state),
            "exp_avg_sq_scale": torch.zeros(numel // abi.BLOCK_NUMEL + 1),
            "result": torch.zeros(2 * (numel // abi.PARTIAL_NUMEL + 1), dtype=torch.float64),
        }
        self.tensors = {name: on_pages(tensor) for name, tensor in self.tensors.items()}
        self.command = Command(
            rule=rule, states=states, gradient_dtype=abi.BF16, parameter_kind=kind, numel=numel, last=numel,
            multiplier=1.0, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY, trust_ratio=1.0,
            **{name: tensor.data_ptr() for name, tensor in self.tensors.items()},
        )  # fmt: skip

    def do(self, op: int) -> None:
        def part(first: int, last: int) -> None:
            if self.library.zl_execute(None, self.command, first, last) != 0:
                raise RuntimeError("the kernels know no such command")

        self.command.op = op
        self.pinned.run(self.low.numel, part)

    def step(self) -> None:
        self.step_number += 1
        command, result = self.command, self.tensors["result"]
        command.seed = self.step_number
        command.bias_correction1 = 1 - BETA1**self.step_number
        command.bias_correction2_sqrt = math.sqrt(1 - BETA2**self.step_number)
        if self.clips:
            self.do(abi.NORM)
            command.multiplier = min(1.0, MAX_NORM / (result[: len(result) // 2].sum().sqrt().item() + 1e-6))
        if command.rule == abi.LAMB:
            self.do(abi.PREPARE)
            squares = result.view(-1, 2).sum(0).tolist()
            command.trust_ratio = math.sqrt(squares[0] / squares[1])
        self.do(abi.STEP)

    def ceiling(self) -> None:
        """The same streams, read and written in place; zeros are added to the states, so they stay what they are."""
        tensors = [self.low.zeros, *(self.tensors[name] for name in ("parameter", "master", "exp_avg", "exp_avg_sq"))]

        def part(first: int, last: int) -> None:
            at = [ctypes.c_void_p(tensor.data_ptr() + first * tensor.element_size()) for tensor in tensors]
            self.ceiling_loop(*at, ctypes.c_size_t(last - first))

        self.pinned.run(self.low.numel, part)


class Cast:
    """A step of an fp32 optimizer between bf16 tensors: three passes, four or five with clipping."""

    def __init__(self, low: Low, make: Callable, clips: bool = False):
        self.low, self.clips = low, clips
        self.parameter = torch.nn.Parameter(low.parameter.float())
        self.parameter.grad = torch.zeros_like(self.parameter)
        self.copy = low.parameter.clone()
        self.optimizer = make([self.parameter])

    def step(self) -> None:
        gradient = self.parameter.grad.copy_(self.low.gradient)
        if self.clips:
            gradient.mul_(min(1.0, MAX_NORM / (gradient.norm().item() + 1e-6)))
        self.optimizer.step()
        self.copy.copy_(self.parameter.detach())


class PlainLamb:
    """LAMB as one writes it in torch, in place where that is natural."""

    def __init__(self, parameters: list[torch.Tensor]):
        self.parameter = parameters[0]
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.parameter), torch.zeros_like(self.parameter)
        self.step_number = 0

    @torch.no_grad()
    def step(self) -> None:
        self.step_number += 1
        parameter, gradient = self.parameter, self.parameter.grad
        self.exp_avg.lerp_(gradient, 1 - BETA1)
        self.exp_avg_sq.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        root = self.exp_avg_sq.sqrt().div_(math.sqrt(1 - BETA2**self.step_number)).add_(EPS)
        direction = (self.exp_avg / (1 - BETA1**self.step_number)).div_(root).add_(parameter, alpha=DECAY)
        parameter.add_(direction, alpha=-LR * (parameter.norm() / direction.norm()).item())


class PlainLion:
    """Lion as one writes it in torch."""

    def __init__(self, parameters: list[torch.Tensor]):
        self.parameter = parameters[0]
        self.exp_avg = torch.zeros_like(self.parameter)

    @torch.no_grad()
    def step(self) -> None:
        update = torch.lerp(self.parameter.grad, self.exp_avg, BETA1).sign_()
        self.parameter.mul_(1 - LR * DECAY).add_(update, alpha=-LR)
        self.exp_avg.lerp_(self.parameter.grad, 1 - BETA2)


def torch_adamw(**how) -> Callable:
    return lambda p: torch.optim.AdamW(p, lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, **how)


def deepspeed(name: str) -> Callable:
    """DeepSpeedCPUAdam or DeepSpeedCPULion; compiled at first use where it has not been."""

    def make(parameters: list[torch.Tensor]):
        from deepspeed.ops import adam, lion

        if name == "adam":
            return adam.DeepSpeedCPUAdam(parameters, lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
        return lion.DeepSpeedCPULion(parameters, lr=LR, betas=(BETA1, BETA2), weight_decay=DECAY)

    return make


MASTER, SPLIT = abi.MASTER_BF16, abi.SPLIT_BF16
FP32, BF16, INT8 = abi.STATES_FP32, abi.STATES_BF16, abi.STATES_INT8
STATE_BYTES = {FP32: 4, BF16: 2, INT8: 1}
# group -> contender -> arguments of Cast (optimizer, clips) or of HostKernels (rule, states, kind, clips, ceiling); the
# others are compared with the first.
GROUPS = {
    "adam": {
        "DeepSpeedCPUAdam": (deepspeed("adam"), False),
        "torch AdamW, fused": (torch_adamw(fused=True), False),
        "torch AdamW, foreach": (torch_adamw(foreach=True), False),
        "zerolite, fp32 master": (abi.ADAMW, FP32, MASTER, False, "master_fp32"),
        "zerolite, split master": (abi.ADAMW, FP32, SPLIT, False, "split_fp32"),
        "zerolite, bf16 states": (abi.ADAMW, BF16, SPLIT, False, "split_bf16"),
        "zerolite, int8 states": (abi.ADAMW, INT8, SPLIT, False, "split_int8"),
    },
    "adam + clip": {
        "DeepSpeedCPUAdam": (deepspeed("adam"), True),
        "torch AdamW, fused": (torch_adamw(fused=True), True),
        "zerolite, fp32 master": (abi.ADAMW, FP32, MASTER, True),
        "zerolite, split master": (abi.ADAMW, FP32, SPLIT, True),
        "zerolite, bf16 states": (abi.ADAMW, BF16, SPLIT, True),
        "zerolite, int8 states": (abi.ADAMW, INT8, SPLIT, True),
    },
    "lion": {
        "DeepSpeedCPULion": (deepspeed("lion"), False),
        "plain torch": (PlainLion, False),
        "zerolite, fp32 master": (abi.LION, FP32, MASTER, False, "lion_master_fp32"),
        "zerolite, split master": (abi.LION, FP32, SPLIT, False, "lion_split_fp32"),
        "zerolite, int8 states": (abi.LION, INT8, SPLIT, False, "lion_split_int8"),
    },
    "lamb": {
        "plain torch": (PlainLamb, False),
        "zerolite, fp32 master": (abi.LAMB, FP32, MASTER, False),
        "zerolite, split master": (abi.LAMB, FP32, SPLIT, False),
        "zerolite, bf16 states": (abi.LAMB, BF16, SPLIT, False),
        "zerolite, int8 states": (abi.LAMB, INT8, SPLIT, False),
    },
}


def build(arguments: tuple, low: Low, pinned: Pinned, ceilings: ctypes.CDLL) -> HostKernels | Cast:
    if callable(arguments[0]):
        return Cast(low, *arguments)
    *head, ceiling = arguments if len(arguments) == 5 else (*arguments, None)
    return HostKernels(low, pinned, *head, ceiling=ceiling and getattr(ceilings, ceiling))


def names_of(group: str) -> list[str]:
    absent = "DeepSpeed" if harness.version("deepspeed") is None else "-"
    return [name for name in GROUPS[group] if absent not in name]


# --- inside a process ------------------------------------------------------------------------------------------------


def nanoseconds(step: Step, numel: int, sample_numel: int) -> float:
    """Time of a step per element of the whole, barrier to barrier; small tensors make several steps. Collective."""
    repeats = max(1, sample_numel // numel)

    def sample() -> None:
        for _ in range(repeats):
            step()

    return 1e9 * harness.seconds(sample) / repeats / numel


def measure(group: str, numel: int, cores: list[int], threads: int, rounds: int, sample: int, ceilings: str) -> dict:
    """Nanoseconds per parameter by contender, a number a round; and of its ceiling around each sample."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    mine = cores[rank * threads : (rank + 1) * threads]
    os.sched_setaffinity(0, mine)
    torch.set_num_threads(threads)
    torch.manual_seed(rank)
    low, pinned = Low(numel // processes), Pinned(mine)
    contenders = {name: build(GROUPS[group][name], low, pinned, ctypes.CDLL(ceilings)) for name in names_of(group)}
    times = {name: {"step": [], "ceiling": []} for name in contenders}
    for index in range(-1, rounds):  # the first round warms up
        for name, contender in contenders.items():
            has_ceiling = getattr(contender, "ceiling_loop", None) is not None
            before = nanoseconds(contender.ceiling, numel, sample) if has_ceiling else None
            step = nanoseconds(contender.step, numel, sample)
            after = nanoseconds(contender.ceiling, numel, sample) if has_ceiling else None
            if index >= 0:
                times[name]["step"].append(step)
                times[name]["ceiling"] += [(before + after) / 2] if has_ceiling else []
    return times


def compare_layouts(numel: int, cores: list[int], rounds: int, sample: int, ceilings: str) -> dict:
    """zerolite's Adam on two processes of one thread, and on two threads of rank 0, in turns: ns per parameter."""
    rank = dist.get_rank()
    library = ctypes.CDLL(ceilings)
    halves, whole = Pinned([cores[rank]]), Pinned(cores[:2])
    names = [name for name in GROUPS["adam"] if name.startswith("zerolite")]
    times = {name: {"processes": [], "threads": []} for name in names}
    for name in names:
        half = build(GROUPS["adam"][name], Low(numel // 2), halves, library)
        full = build(GROUPS["adam"][name], Low(numel), whole, library) if rank == 0 else None
        for index in range(-1, rounds):
            os.sched_setaffinity(0, {cores[rank]})
            processes = nanoseconds(half.step, numel, sample)
            os.sched_setaffinity(0, set(cores))
            threads = nanoseconds(full.step if full else lambda: None, numel, sample)
            if index >= 0:
                times[name]["processes"].append(processes)
                times[name]["threads"].append(threads)
    return times


# --- outside ---------------------------------------------------------------------------------------------------------


def build_ceilings(folder: str) -> str:
    """Compile ceiling.c for this machine."""
    library = str(Path(folder) / "ceiling.so")
    flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, Path(__file__).with_name("ceiling.c"), "-o", library], check=True)
    return library


def collect(options: argparse.Namespace) -> dict:
    facts = harness.machine_facts(("torch", "deepspeed"))
    facts["path"] = cpu.load().zl_path().decode()
    cores = sorted(os.sched_getaffinity(0))
    common = {"cores": cores, "rounds": options.rounds, "sample": options.sample * 10**6}
    rows, pairs = [], []
    with tempfile.TemporaryDirectory(prefix="zerolite-bench-") as folder:
        common["ceilings"] = build_ceilings(folder)
        for group, size, layout in itertools.product(options.groups, options.sizes, options.layouts):
            processes, threads = LAYOUTS[layout]
            arguments = common | {"group": group, "numel": whole_blocks(size), "threads": threads}
            times = harness.launch(measure, arguments, processes, {"OMP_NUM_THREADS": str(threads)})[0]
            rows.append({"group": group, "millions": size, "layout": layout, "times": times})
            print(summary(rows[-1]), flush=True)
        if "adam" in options.groups and set(options.layouts) >= {"1x2", "2x1"}:
            for size in options.sizes:
                times = harness.launch(compare_layouts, common | {"numel": whole_blocks(size)}, 2)[0]
                pairs.append({"millions": size, "times": times})
    return {
        "facts": facts,
        "settings": {"rounds": options.rounds, "sample_millions": options.sample},
        "rows": rows,
        "layouts": pairs,
    }


def whole_blocks(millions: int) -> int:
    """About so many elements, which two processes can share."""
    return millions * 10**6 // (2 * abi.PARTIAL_NUMEL) * (2 * abi.PARTIAL_NUMEL)


def ratios(over: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def spelled(values: list[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def summary(row: dict) -> str:
    """One table: a contender's time, its speed over the first one's in the same round, its share of the ceiling."""
    base = next(iter(row["times"].values()))["step"]
    lines = []
    for name, times in row["times"].items():
        arguments = GROUPS[row["group"]][name]
        rate = ""
        if not callable(arguments[0]) and arguments[0] != abi.LAMB and not arguments[3]:
            rate = f"{bytes_moved(*arguments[:3]) / statistics.median(times['step']):.1f}"
        share = spelled(ratios(times["ceiling"], times["step"])) if times["ceiling"] else ""
        lines.append([name, spelled(times["step"], 3), spelled(ratios(base, times["step"])), rate, share])
    header = ["contender", "ns per parameter", f"times as fast as {next(iter(row['times']))}", "GB/s", "of the ceiling"]
    title = f"### {row['group']}, {row['millions']}M, {row['layout']}"
    return f"{title}\n\n{harness.markdown_table(header, lines)}\n"


def bytes_moved(rule: int, states: int, kind: int) -> int:
    """Of a parameter and step: what is only read or only written counts once, what is updated twice."""
    moments = 1 if rule == abi.LION else 2
    return 2 + (2 + 2 * 4 if kind == MASTER else 2 * 2 + 2 * 2) + 2 * moments * STATE_BYTES[states]


def markdown(report: dict) -> str:
    pairs = harness.markdown_table(
        ["zerolite's Adam", "size", "2 processes, ns", "2 threads, ns", "processes / threads"],
        [
            [name, f"{pair['millions']}M", spelled(times["processes"], 3), spelled(times["threads"], 3),
             spelled(ratios(times["processes"], times["threads"]))]
            for pair in report["layouts"] for name, times in pair["times"].items()
        ],
    )  # fmt: skip
    return f"""# One optimizer step on the host: bf16 gradient in, bf16 parameter out

{harness.facts_markdown(report["facts"])}; kernels' path {report["facts"]["path"]}

Medians (and ranges) of {report["settings"]["rounds"]} rounds, in which contenders take turns; ratios are those within
a round. The ceiling: the same streams read and written in place, just before and after each sample. Layouts are
processes x threads, every one on a core of its own. "+ clip" includes the norm of the gradient and its scaling. Times
of different tables are not comparable: neighbours on the host change the bandwidth.

{"".join(summary(row) + chr(10) for row in report["rows"])}
### Two processes or two threads, in turns

{pairs}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 10, 100], help="millions of parameters")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="processes x threads")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sample", type=int, default=20, help="millions of elements that a sample steps, at least")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    options.layouts = [layout for layout in options.layouts if math.prod(LAYOUTS[layout]) <= cores]
    report = collect(options)
    harness.write_report(options.output, "cpu_optimizer", report, markdown(report))


if __name__ == "__main__":
    main()
