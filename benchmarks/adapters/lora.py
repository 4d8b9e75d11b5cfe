"""LoRA's projections, alone and Q, K, V together: time, bytes kept for backward, and error of each way to compute them.

Contenders: the frozen layers without any LoRA; PEFT at dropout 0 and 0.05; PEFT under torch.compile; the addmm formula
that Unsloth and axolotl use (written here from the formula, without dropout); zerolite at dropout 0 and 0.05. They take
turns, round by round, on the same inputs, weights and gradients; ratios are those within a round.

    python benchmarks/adapters/lora.py                                   # small shapes on the CPU, 7b on a GPU
    python benchmarks/adapters/lora.py --models 7b 13b 70b --tokens 1024 8192 32768 --ranks 8 16 64 128 --dtype bf16
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all benchmarks share

import harness
import torch
import torch.nn.functional as F
from harness import DEVICE, MIB
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from zerolite_kernels.lora import lora_linears

# model -> (K, widths of q, k and v)
MODELS = {
    "tiny": (512, (512, 512, 512)),
    "1b": (2048, (2048, 512, 512)),
    "7b": (4096, (4096, 4096, 4096)),
    "13b": (5120, (5120, 5120, 5120)),
    "70b": (8192, (8192, 1024, 1024)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALPHA, DROPOUT = 16.0, 0.05

Forward = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


class Layers(NamedTuple):
    """What all contenders compute with: K -> each width, rank r."""

    weights: list[torch.Tensor]  # (N, K), frozen
    As: list[torch.Tensor]  # (r, K)
    Bs: list[torch.Tensor]  # (N, r)
    scale: float

    def adapters(self) -> list[torch.Tensor]:
        return [*self.As, *self.Bs]


def layers(k: int, widths: tuple[int, ...], rank: int, dtype: torch.dtype) -> Layers:
    def draw(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, device=DEVICE.type) * scale).to(dtype)

    weights = [draw(n, k, scale=k**-0.5) for n in widths]
    As = [nn.Parameter(draw(rank, k, scale=k**-0.5)) for _ in widths]
    Bs = [nn.Parameter(draw(n, rank, scale=rank**-0.5)) for n in widths]
    return Layers(weights, As, Bs, ALPHA / rank)


# --- contenders: each gives a forward over the same layers ----------------------------------------------------------


def frozen(given: Layers) -> Forward:
    return lambda x: tuple(F.linear(x, weight) for weight in given.weights)


def zerolite(given: Layers, dropout: float) -> Forward:
    nothing = [None] * len(given.weights)
    return lambda x: lora_linears(x, given.weights, nothing, given.As, given.Bs, given.scale, dropout)


def peft(given: Layers, dropout: float, compiled: bool = False) -> Forward:
    """PEFT's own layers, with its default of adapters kept in the dtype they are given."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraConfig

    rank = given.As[0].shape[0]
    modules = nn.ModuleList()
    for weight, a, b in zip(given.weights, given.As, given.Bs, strict=True):
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        base.weight = nn.Parameter(weight, requires_grad=False)
        config = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=dropout)
        layer = LoraLinear(base, "default", config=config, r=rank, lora_alpha=ALPHA)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
        modules.append(layer)

    class Projections(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = modules

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(layer(x) for layer in self.layers)

    module = Projections().train()
    return torch.compile(module) if compiled else module


class Addmm(torch.autograd.Function):
    """y = xW^T, then y += s (xA^T) B^T in one addmm; backward recomputes xA^T and adds up dx in place. No dropout."""

    @staticmethod
    def forward(ctx, x, scale, count, *tensors):
        weights, As, Bs = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        ctx.save_for_backward(x, *tensors)
        ctx.scale, ctx.count = scale, count
        return tuple(
            F.linear(x, weight).addmm_(x @ a.t(), b.t(), alpha=scale)
            for weight, a, b in zip(weights, As, Bs, strict=True)
        )

    @staticmethod
    def backward(ctx, *dys):
        x, *tensors = ctx.saved_tensors
        count, scale = ctx.count, ctx.scale
        weights, As, Bs = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        dx, dAs, dBs = None, [], []
        for dy, weight, a, b in zip(dys, weights, As, Bs, strict=True):
            ds = dy @ b
            dAs.append((ds.t() @ x).mul_(scale))
            dBs.append((dy.t() @ (x @ a.t())).mul_(scale))
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            dx.addmm_(ds, a, alpha=scale)
        return dx, None, None, *[None] * count, *dAs, *dBs


def addmm(given: Layers) -> Forward:
    return lambda x: Addmm.apply(x, given.scale, len(given.weights), *given.weights, *given.As, *given.Bs)


CONTENDERS: dict[str, Callable[[Layers], Forward]] = {
    "frozen": frozen,
    "PEFT, dropout 0": lambda given: peft(given, 0.0),
    "PEFT, dropout 0.05": lambda given: peft(given, DROPOUT),
    "PEFT compiled, dropout 0": lambda given: peft(given, 0.0, compiled=True),
    "PEFT compiled, dropout 0.05": lambda given: peft(given, DROPOUT, compiled=True),
    "addmm formula, dropout 0": addmm,
    "zerolite, dropout 0": lambda given: zerolite(given, 0.0),
    "zerolite, dropout 0.05": lambda given: zerolite(given, DROPOUT),
}
AGAINST = ("frozen", "PEFT, dropout 0", "PEFT, dropout 0.05", "addmm formula, dropout 0")


# --- what is measured -----------------------------------------------------------------------------------------------


def elapsed_ms(work: Callable[[], object], repeats: int) -> float:
    """Of one call, over `repeats` of them; on a GPU by events."""
    if DEVICE.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return 1e3 * (time.perf_counter() - began) / repeats


def once(forward: Forward, x: torch.Tensor, dys: list[torch.Tensor], repeats: int) -> dict[str, float]:
    """Milliseconds of forward, backward and both."""
    forward_ms = elapsed_ms(lambda: forward(x), repeats)
    graphs = [forward(x) for _ in range(repeats)]
    backward_ms = elapsed_ms(lambda: torch.autograd.backward(graphs.pop(), dys), repeats)
    both_ms = elapsed_ms(lambda: torch.autograd.backward(forward(x), dys), repeats)
    return {"forward": forward_ms, "backward": backward_ms, "both": both_ms}


def saved_bytes(forward: Forward, x: torch.Tensor, given: Layers) -> int:
    """Unique storages that autograd keeps, weights and adapters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*given.weights, *given.adapters())}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward(x)  # alive while its storages are counted, so that no address comes twice
    del kept
    return sum(storages.values())


def errors(forward: Forward, x: torch.Tensor, dys: list[torch.Tensor], given: Layers) -> dict[str, float]:
    """||found - fp64|| / ||fp64|| of outputs, dx, dA and dB, without dropout; the worst of the projections."""
    leaves = [x, *given.adapters()]
    outputs = forward(x)
    found = [*outputs, *torch.autograd.grad(outputs, leaves, dys)]
    found = [tensor.detach() for tensor in found]
    x64 = x.detach().double().requires_grad_()
    As, Bs = ([t.detach().double().requires_grad_() for t in group] for group in (given.As, given.Bs))
    truth_outputs = tuple(
        F.linear(x64, weight.double()) + given.scale * (x64 @ a.t() @ b.t())
        for weight, a, b in zip(given.weights, As, Bs, strict=True)
    )
    truth = [
        *(y.detach() for y in truth_outputs),
        *torch.autograd.grad(truth_outputs, [x64, *As, *Bs], [dy.double() for dy in dys]),
    ]
    relative = [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, truth, strict=True)]
    n = len(given.weights)
    parts = {"y": relative[:n], "dx": relative[n : n + 1], "dA": relative[n + 1 : 2 * n + 1], "dB": relative[-n:]}
    return {name: max(values) for name, values in parts.items()}


def measure(case: dict, names: list[str], rounds: int, sample_ms: float) -> dict:
    """All contenders on one shape, in turns."""
    torch.manual_seed(0)
    dtype, k = DTYPES[case["dtype"]], MODELS[case["model"]][0]
    widths = MODELS[case["model"]][1][: 3 if case["kind"] == "qkv" else 1]
    given = layers(k, widths, case["rank"], dtype)
    x = torch.randn(case["tokens"], k, device=DEVICE.type).to(dtype).requires_grad_()
    dys = [torch.randn(case["tokens"], n, device=DEVICE.type).to(dtype) for n in widths]
    forwards = {name: CONTENDERS[name](given) for name in names}
    rows: dict[str, dict] = {}
    for name, forward in forwards.items():
        rows[name] = {"saved_bytes": saved_bytes(forward, x, given), "times": []}
        if "0.05" not in name and name != "frozen":
            rows[name]["errors"] = errors(forward, x, dys, given)
    first_ms = once(forwards[names[0]], x, dys, 1)["both"]
    repeats = max(1, int(sample_ms / max(first_ms, 1e-3)))
    for index in range(-1, rounds):  # the first round warms up
        for name, forward in forwards.items():
            times = once(forward, x, dys, repeats)
            if index >= 0:
                rows[name]["times"].append(times)
            x.grad = None
            for tensor in given.adapters():
                tensor.grad = None
    return case | {"repeats": repeats, "rows": rows}


# --- what is written ------------------------------------------------------------------------------------------------


def ratio(over: dict, under: dict, phase: str) -> float:
    """Median over rounds of how many times as long `over` takes."""
    pairs = zip(over["times"], under["times"], strict=True)
    return statistics.median(one[phase] / other[phase] for one, other in pairs)


def table(case: dict) -> str:
    rows = case["rows"]
    against = [name for name in AGAINST if name in rows]
    lines = []
    for name, row in rows.items():
        times = [statistics.median(t[phase] for t in row["times"]) for phase in ("forward", "backward", "both")]
        speeds = [f"{ratio(rows[other], row, 'both'):.2f}" for other in against]
        error = " / ".join(f"{value:.1e}" for value in row.get("errors", {}).values())
        lines.append([name, *(f"{t:.3f}" for t in times), *speeds, f"{row['saved_bytes'] / MIB:.2f}", error])
    header = [
        "contender", "forward, ms", "backward, ms", "both, ms", *(f"times as fast as {name}" for name in against),
        "saved, MiB", "error of y / dx / dA / dB",
    ]  # fmt: skip
    title = f"### {case['kind']}, {case['model']}, {case['tokens']} tokens, r = {case['rank']}, {case['dtype']}"
    return f"{title}\n\n{harness.markdown_table(header, lines)}\n"


def markdown(report: dict) -> str:
    return f"""# LoRA's projections: {DEVICE.type}

{harness.facts_markdown(report["facts"])}

Medians of {report["rounds"]} rounds in which contenders take turns, {report["threads"]} threads on the CPU; speeds are
of forward and backward together, medians of the ratios within a round. Saved: what autograd keeps for backward, unique
storages, weights and adapters left out. Errors: norm of the difference to fp64 over the norm of fp64, without dropout.

{"".join(table(case) + chr(10) for case in report["cases"])}"""


def plot(report: dict, path: Path) -> None:
    """Forward and backward of each contender over the frozen layers', a panel for each of the first cases."""
    panels = []
    for case in report["cases"][:6]:
        rows = case["rows"]
        panels.append(
            {
                "title": f"{case['kind']}, {case['model']}, {case['tokens']} tokens, r = {case['rank']}",
                "labels": list(rows),
                "values": [ratio(row, rows["frozen"], "both") for row in rows.values()],
                "marks": None,
                "legend": None,
            }
        )
    harness.bar_panels(path, f"Forward and backward over the frozen layers', {DEVICE.type}", panels)


def main() -> None:
    on_gpu = DEVICE.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=("qkv", "single"), default=["qkv", "single"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["7b"] if on_gpu else ["tiny", "1b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 8192, 32768] if on_gpu else [512, 2048])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64, 128] if on_gpu else [8])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sample-ms", type=float, default=50.0, help="least length of one sample")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu, help="with compiled PEFT")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    names = list(CONTENDERS)
    if harness.version("peft") is None:
        print("peft is not installed: its rows are left out")
        names = [name for name in names if not name.startswith("PEFT")]
    names = [name for name in names if options.compile or "compiled" not in name]
    facts = harness.machine_facts(("torch", "triton", "peft"))
    cases = []
    for kind, model, tokens, rank in itertools.product(options.kinds, options.models, options.tokens, options.ranks):
        case = {"kind": kind, "model": model, "tokens": tokens, "rank": rank, "dtype": options.dtype}
        cases.append(measure(case, names, options.rounds, options.sample_ms))
        print(table(cases[-1]), flush=True)
    report = {"facts": facts, "rounds": options.rounds, "threads": torch.get_num_threads(), "cases": cases}
    name = f"lora_{options.dtype}_{DEVICE.type}"
    target = harness.write_report(options.output, name, report, markdown(report))
    plot(report, target.with_suffix(".png"))


if __name__ == "__main__":
    main()
