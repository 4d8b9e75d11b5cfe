"""Beyond this machine: what does the engine hold, send and cost in Python at 8 to 4,096 ranks, and how does that grow?

The engine's own units, buckets, shards and walk run as one of N ranks, on tensors without memory and groups that only
count (zerolite/memory/dry_engine.py): a step of forwards, backwards and the optimizer's publication. Without a batch,
so that what is told are model states, buckets and units in flight. Python calls are those of the engine in that step,
counted, not timed; they do not depend on the machine.

    python benchmarks/scale/at_scale.py                                          # about two minutes
    python benchmarks/scale/at_scale.py --models llama-7b --ranks 8 64 --parameters 1000 2000
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all benchmarks share

import harness
import torch
from torch import nn

import zerolite
from zerolite.memory.dry_engine import dry_engine
from zerolite.memory.moments import Profile
from zerolite.memory.presets import PRESETS
from zerolite.memory.subject import Subject
from zerolite.memory.walk import Walk
from zerolite.offload.placement import Policy
from zerolite.shards.layout import Partition

PRECISION = zerolite.Precision(torch.bfloat16, torch.bfloat16)
GIB = 2**30


class Expert(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)


class Block(nn.Module):
    """Attention and experts of a mixture, as parameters: 4 + 3 a expert."""

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.attention = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))


def mixture(num_parameters: int, blocks: int = 48, width: int = 1024) -> nn.Module:
    """About so many parameters, in 48 blocks."""
    with torch.device("meta"):
        return nn.Sequential(*(Block(width, max(1, round((num_parameters / blocks - 4) / 3))) for _ in range(blocks)))


def run(subject: Subject, stage: int, shards: int, replicas: int) -> dict:
    """One dry step; the first, which makes nothing that a later one finds, beside what it holds and sends."""
    plans = subject.unit_plans(PRECISION)
    start = time.process_time()
    policy = Policy(Partition(stage), shards, PRECISION, subject.dtype_of(PRECISION))
    engine = dry_engine(plans, policy, None, replicas, receives_apart=False)
    walk = Walk(engine, zerolite.AdamW.rule, Profile.without_activations(plans), 0)
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        walked = walk.run(1)
    finally:
        sys.setprofile(None)
    return {
        "model": subject.name,
        "parameters": sum(1 for _ in subject.model.parameters()),
        "numel": subject.numel(),
        "stage": stage,
        "shards": shards,
        "replicas": replicas,
        "states_bytes": sum(walked.states.values()),
        "peak_bytes": max(peak.total_bytes for peak in walked.peaks.values()),
        "sent_bytes": walked.traffic.sent_bytes,
        "messages": walked.traffic.num_collectives,
        "python_calls": calls,
        "seconds": time.process_time() - start,
    }


def cells(row: dict) -> list[str]:
    ranks = f"{row['shards']:,}" if row["replicas"] == 1 else f"{row['replicas']} x {row['shards']:,}"
    sizes = [f"{row[name] / GIB:.2f}" for name in ("states_bytes", "peak_bytes", "sent_bytes")]
    counts = [f"{row['messages']:,}", f"{row['python_calls']:,}", f"{row['seconds']:.1f}"]
    return [row["model"], str(row["stage"]), ranks, *sizes, *counts]


def draw(path: Path, sizes: list[dict], growth: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for model in dict.fromkeys(row["model"] for row in sizes):
        rows = [row for row in sizes if row["model"] == model and row["stage"] == 3 and row["replicas"] == 1]
        left.plot([row["shards"] for row in rows], [row["peak_bytes"] / GIB for row in rows], marker="o", label=model)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="ranks",
        ylabel="GiB on a rank, stage 3",
        title="States fall as 1 / N, units in flight stay",
    )
    left.legend(frameon=False)
    right.plot([row["parameters"] for row in growth], [row["python_calls"] for row in growth], marker="o")
    right.set(
        xlabel="parameters", ylabel="Python calls a step", title="A mixture of experts at stage 3", ylim=(0, None)
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    models = ["llama-7b", "llama-70b", "llama-3-405b"]
    parser.add_argument("--models", nargs="+", choices=PRESETS, default=models)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 512, 4096])
    parser.add_argument("--parameters", nargs="+", type=int, default=[2500, 5000, 10000, 20000], help="of the mixture")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args()
    sizes = []
    for model in options.models:
        subject = Subject(model)
        for stage in (1, 2, 3):
            sizes += [run(subject, stage, ranks, 1) for ranks in options.ranks]
        most = max(options.ranks)
        sizes.append(run(subject, 3, 8, most // 8))
    growth = []
    for number in options.parameters:
        subject = Subject(mixture(number))
        subject.name = "mixture"
        growth.append(run(subject, 3, 64, 1))
    header = ["model", "stage", "ranks", "states GiB", "peak GiB", "sent GiB", "messages", "Python calls", "CPU s"]
    facts = harness.machine_facts(("torch", "transformers"))
    mixtures = [[f"{row['parameters']:,}", *cells(row)[6:]] for row in growth]
    text = "\n\n".join(
        [
            "# The engine at 8 to 4,096 ranks, without a machine",
            harness.facts_markdown(facts),
            "Bytes of one rank: AdamW, parameters and reduction in bf16, no activations. `R x S`: R replicas of S "
            "ranks that shard.",
            harness.markdown_table(header, [cells(row) for row in sizes]),
            "A mixture of experts in 48 blocks, stage 3, 64 ranks: cost against the number of parameters.",
            harness.markdown_table(["parameters", *header[6:]], mixtures),
        ]
    )
    target = harness.write_report(options.output, "at_scale", {"facts": facts, "sizes": sizes, "growth": growth}, text)
    draw(target.with_suffix(".png"), sizes, growth)
    print(text)


if __name__ == "__main__":
    main()
