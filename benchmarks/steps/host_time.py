"""What the host pays for a step: stages 0 to 3 of this checkout beside those of another one.

A thin LLaMA has the eight layers of `zero_step.py --size s`, 64 wide, and reads 8 tokens: its arithmetic is next to
nothing, so the time of its step is hooks, checks, collectives' calls and autograd's own. What that differs between two
checkouts, over the seconds of a step of size s, is what a change costs that step; the wide step itself is too noisy for
one percent.

    git worktree add ../before COMMIT
    python benchmarks/steps/host_time.py --against ../before
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all benchmarks share

import contenders
import harness
import torch.distributed as dist
from harness import DEVICE

MODES = [mode for mode in contenders.CONTENDERS if mode.startswith("zerolite")]
THIN, TOKENS = (64, 8, 176, 8), 8
WARMUP, WIDE_STEPS = 30, 6
HERE = Path(__file__).resolve().parents[2]


# --- inside a rank --------------------------------------------------------------------------------------------------


def measure(mode: str, thin: bool, steps: int) -> dict:
    """Median seconds of this rank's steps, and of its process's CPU time in them."""
    importlib.import_module("transformers.models.llama.modeling_llama")
    warmup, tokens = (WARMUP, TOKENS) if thin else (2, contenders.SEQUENCE)
    if thin:
        contenders.SIZES["s"] = THIN
    world = dist.get_world_size()
    model = contenders.build_model("s", tokens)
    data = contenders.batches(warmup + steps, dist.get_rank(), world, contenders.MICRO_BATCH * world, tokens)
    training = contenders.CONTENDERS[mode].build(model, "fp32")
    wall, cpu = [], []
    for batch in data:
        dist.barrier()
        DEVICE.synchronize()
        started, used = time.perf_counter(), time.process_time()
        training.backward(training.forward(batch))
        training.step()
        DEVICE.synchronize()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    loaded = str(Path(sys.modules["zerolite"].__file__).parents[1])
    return {"wall": statistics.median(wall[warmup:]), "cpu": statistics.median(cpu[warmup:]), "loaded": loaded}


# --- over the runs --------------------------------------------------------------------------------------------------


def run(mode: str, checkout: Path, options: argparse.Namespace, thin: bool) -> dict:
    """The slowest rank's seconds, and the mean CPU seconds a rank, with zerolite from a checkout."""
    arguments = {"mode": mode, "thin": thin, "steps": options.steps if thin else WIDE_STEPS}
    ranks = harness.launch(measure, arguments, options.ranks, {"PYTHONPATH": str(checkout)})
    if any(rank["loaded"] != str(checkout) for rank in ranks):
        raise harness.RankError(f"zerolite came from {ranks[0]['loaded']}; expected {checkout}")
    return {"wall": max(rank["wall"] for rank in ranks), "cpu": statistics.mean(rank["cpu"] for rank in ranks)}


def collect(options: argparse.Namespace) -> dict:
    """Both checkouts by turns, repeat after repeat; which of the two begins alternates."""
    facts = harness.machine_facts(("torch", "transformers"))
    rows = []
    for mode in options.modes:
        thin = {"this": [], "other": []}
        for repeat in range(options.repeats):
            pair = [("this", HERE), ("other", options.against.resolve())]
            for name, checkout in pair[:: -1 if repeat % 2 else 1]:
                thin[name].append(run(mode, checkout, options, thin=True))
        wide = run(mode, HERE, options, thin=False)["wall"]
        rows.append({"mode": mode, "wide_seconds": wide, **thin})
        print(line_of(rows[-1]), flush=True)
    settings = {"ranks": options.ranks, "steps": options.steps, "repeats": options.repeats}
    return {"facts": facts, "settings": settings, "rows": rows}


# --- what is written ------------------------------------------------------------------------------------------------


def line_of(row: dict) -> list[str]:
    """Mode, milliseconds of the other and of this checkout (wall, CPU), and the difference over a step of size s."""

    def milliseconds(name: str, clock: str) -> float:
        return 1e3 * statistics.median(run[clock] for run in row[name])

    walls, cpus = ([milliseconds(name, clock) for name in ("other", "this")] for clock in ("wall", "cpu"))
    wide = 1e3 * row["wide_seconds"]
    return [
        row["mode"],
        *(f"{other:.2f} / {this:.2f}" for other, this in (walls, cpus)),
        f"{wide:.0f}",
        f"{100 * (walls[1] - walls[0]) / wide:+.2f} %",
    ]


def markdown(report: dict) -> str:
    table = harness.markdown_table(
        ["", "thin step, other / this, ms", "its CPU time a rank, ms", "step of size s, ms", "difference over it"],
        [line_of(row) for row in report["rows"]],
    )
    text = (
        "# Host time of a step\n\n{facts}\n\nA thin LLaMA (8 layers, 64 wide, 8 tokens), {ranks} ranks, fp32, fused "
        "AdamW: median of {steps} steps of the slowest rank, median over {repeats} repeats by turns. The last column "
        "is the difference of the thin steps over the seconds of a step of `zero_step.py --size s`.\n\n{table}\n"
    )
    return text.format(facts=harness.facts_markdown(report["facts"]), table=table, **report["settings"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="timed steps of a run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    if not (options.against / "zerolite").is_dir():
        parser.error(f"--against: {options.against} holds no zerolite; expected a checkout's folder")
    report = collect(options)
    harness.write_report(options.output, f"host_time_{DEVICE.type}", report, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
