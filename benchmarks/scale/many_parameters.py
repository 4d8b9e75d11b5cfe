"""What a step costs the host with 20,000 small parameters, beside FSDP2, and whether that grows linearly with them.

A mixture-like model: 48 blocks, each with so many 16 x 16 matrices, every one of which gets a gradient; 4 tokens. Its
arithmetic is next to nothing, so the CPU time of a step is Python: autograd's own, hooks, buckets, the optimizer. One
pair of ranks has all contenders and takes a step of each by turns, in an order that rotates; a ratio is of two steps of
one round, its median over rounds is told. FSDP2 has torch's fused AdamW.

    python benchmarks/scale/many_parameters.py            # minutes on quiet cores: FSDP2 starts slowly
    python benchmarks/scale/many_parameters.py --parameters 960 1920 3840 --rounds 5
    python benchmarks/scale/many_parameters.py --alone    # how zerolite itself grows
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all benchmarks share

import harness
import torch
import torch.distributed as dist
from torch import nn

BLOCKS, WIDTH, TOKENS, WARMUP = 48, 16, 4, 2
RIVALS = {"zerolite2": "fsdp2_keep", "zerolite3": "fsdp2"}  # what each is compared with


class Experts(nn.Module):
    """The sum of its experts, each one matrix, beside the input."""

    def __init__(self, count: int):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(0.02 * torch.randn(WIDTH, WIDTH)) for _ in range(count))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.stack([hidden @ weight for weight in self.weights]).sum(0)


def build(name: str, num_parameters: int) -> Callable[[], None]:
    """One step of a contender: forward, backward, optimizer, zero_grad. Collective."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Experts(num_parameters // BLOCKS) for _ in range(BLOCKS)))
    if name.startswith("zerolite"):
        import zerolite

        zerolite.shard(model, stage=int(name[-1]))
        optimizer = zerolite.AdamW(model.parameters(), lr=1e-4)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model:
            fully_shard(block, mesh=mesh, reshard_after_forward=name == "fsdp2")
        fully_shard(model, mesh=mesh, reshard_after_forward=name == "fsdp2")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randn(TOKENS, WIDTH)

    def step() -> None:
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(num_parameters: int, rounds: int, names: list[str]) -> dict[str, list[float]]:
    """CPU seconds of this rank's steps, by contender, round after round."""
    steps = {name: build(name, num_parameters) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARMUP + rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            dist.barrier()
            start = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - start)
    return {name: values[WARMUP:] for name, values in seconds.items()}


def collect(options: argparse.Namespace) -> list[dict]:
    rows, names = [], [*RIVALS, *([] if options.alone else RIVALS.values())]
    for number in options.parameters:
        ranks = harness.launch(
            measure, {"num_parameters": number, "rounds": options.rounds, "names": names}, options.ranks
        )
        for own, other in RIVALS.items():
            steps = [values for rank in ranks for values in rank[own]]
            row = {"parameters": number // BLOCKS * BLOCKS, "own": own, "own_seconds": statistics.median(steps)}
            if other in names:
                others = [values for rank in ranks for values in rank[other]]
                ratio = statistics.median(mine / theirs for mine, theirs in zip(steps, others, strict=True))
                row |= {"other": other, "other_seconds": statistics.median(others), "ratio": ratio}
            rows.append({**row, "ranks": ranks})
            print({name: value for name, value in rows[-1].items() if name != "ranks"}, flush=True)
    return rows


def cells(row: dict) -> list[str]:
    own = 1e3 * row["own_seconds"]
    name, times, ratio = row["own"], f"{own:.0f}", "–"
    if "other" in row:
        name += f" / {row['other']}"
        times, ratio = f"{own:.0f} / {1e3 * row['other_seconds']:.0f}", f"{row['ratio']:.2f}"
    return [f"{row['parameters']:,}", name, times, ratio, f"{1e3 * own / row['parameters']:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", nargs="+", type=int, default=[5000, 10000, 20000])
    parser.add_argument("--rounds", type=int, default=8, help="of one step of each contender")
    parser.add_argument("--alone", action="store_true", help="zerolite without FSDP2, whose first step grows faster")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    facts = harness.machine_facts(("torch",))
    rows = collect(options)
    header = ["parameters", "", "CPU ms a step and rank", "ratio in a round", "us a parameter, zerolite"]
    text = "\n\n".join(
        [
            "# The host's time of a step with many small parameters",
            harness.facts_markdown(facts),
            f"{BLOCKS} blocks of {WIDTH} x {WIDTH} matrices, {TOKENS} tokens, fp32, AdamW, {options.ranks} ranks over "
            f"gloo, one thread each. Medians over {options.rounds} rounds and the ranks; `fsdp2_keep` does not reshard "
            "after forward, as stage 2.",
            harness.markdown_table(header, [cells(row) for row in rows]),
        ]
    )
    name = "many_parameters_alone_cpu" if options.alone else "many_parameters_cpu"
    harness.write_report(options.output, name, {"facts": facts, "rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()
