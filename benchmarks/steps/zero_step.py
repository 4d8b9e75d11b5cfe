"""One data-parallel training step: what do ZeRO's stages cost in time, memory and communication, and in whose hands?

zerolite's stages 0 to 3 beside DDP, ZeroRedundancyOptimizer, FSDP2 and (where installed) DeepSpeed: the same LLaMA, the
same data and seed, the same fused AdamW, each in fresh processes. DDP runs at the start and at the end of every repeat;
a contender's step counts as a ratio to their mean, and how far the two lie apart is the noise. Per-step losses stand
beside those of `single`: one process, plain torch, the joint batch.

    python benchmarks/steps/zero_step.py --size s                  # 33.5M parameters; two ranks on this machine
    python benchmarks/steps/zero_step.py --size m --repeats 1      # 142.9M
    python benchmarks/steps/zero_step.py --size s --precision bf16
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all benchmarks share

import harness
import torch.distributed as dist
from contenders import CONTENDERS, MICRO_BATCH, REFERENCE, SEQUENCE, SIZES, batches, build_model
from harness import DEVICE, MIB

WARMUP, AFTER = 3, 2  # untimed steps before the timed ones, and after them: one for memory, one for counting bytes
# Large blocks from mmap, so that freed memory returns to the system at once: true peaks, but slow steps.
MMAP = {"MALLOC_MMAP_THRESHOLD_": "262144"}


# --- inside a rank --------------------------------------------------------------------------------------------------


def measure(mode: str, size: str, precision: str, steps: int, joint: int) -> dict:
    """One contender's run on this rank: losses of all steps, times of the middle ones, memory, bytes sent."""
    contender = CONTENDERS.get(mode, REFERENCE)
    importlib.import_module(contender.library)
    importlib.import_module("transformers.models.llama.modeling_llama")
    DEVICE.reset_peak()
    base, base_peak = DEVICE.used_bytes(), DEVICE.peak_bytes()
    model = build_model(size)
    block, *others = (sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    parameters = sum(p.numel() for p in model.parameters())
    data = iter(batches(WARMUP + steps + AFTER, dist.get_rank(), dist.get_world_size(), joint))
    training = contender.build(model, precision)
    losses, memory = [], {}

    def step(look=lambda phase: None):
        loss = training.forward(next(data))
        look("forward")
        training.backward(loss)
        losses.append(loss.detach())
        del loss
        look("backward")
        training.step()
        look("step")

    def look(phase):
        memory[phase] = {"tensors": harness.tensor_bytes(), "used": DEVICE.used_bytes() - base}

    for _ in range(WARMUP - 1):
        step()
    DEVICE.reset_peak()  # what building took is not a step's memory
    step()
    times = [harness.seconds(step) for _ in range(steps)]
    step(look)
    peak = DEVICE.peak_bytes() - base_peak
    with harness.SentBytes() as sent:
        step()
    return {
        "parameters": parameters,
        "block_parameters": block,
        "root_parameters": parameters - block - sum(others),
        "times": times,
        "losses": [loss.item() for loss in losses],
        "memory": memory,
        "peak": peak,
        "sent": sent.by_op,
    }


# --- over the runs --------------------------------------------------------------------------------------------------


def run(mode: str, options: argparse.Namespace, steps: int, env: dict | None = None) -> dict:
    """Launch one contender and fold its ranks: rank 0's times, the mean loss, the most memory and bytes of any rank."""
    arguments = {"mode": mode, "size": options.size, "precision": options.precision, "steps": steps}
    arguments["joint"] = MICRO_BATCH * options.ranks
    ranks = harness.launch(measure, arguments, 1 if mode == "single" else options.ranks, env)
    times = ranks[0]["times"]
    print(f"{mode:16}" + (f"{statistics.median(times):8.3f} s a step" if times else "  memory"), flush=True)
    return ranks[0] | {
        "losses": [statistics.mean(step) for step in zip(*(rank["losses"] for rank in ranks), strict=True)],
        "memory": {
            phase: {kind: max(rank["memory"][phase][kind] for rank in ranks) for kind in ("tensors", "used")}
            for phase in ("forward", "backward", "step")
        },
        "peak": max(rank["peak"] for rank in ranks),
        "sent": max((rank["sent"] for rank in ranks), key=lambda sent: sum(sent.values())),
    }


def collect(options: argparse.Namespace) -> dict:
    """Run everything, repeats interleaved, and return what the JSON file holds."""
    facts = harness.machine_facts(("torch", "transformers", "deepspeed"))
    modes = [mode for mode in options.modes if harness.version(CONTENDERS[mode].library)]
    runs, ddp_steps, noise = {mode: [] for mode in modes}, [], []
    reference = run("single", options, options.steps)
    for _ in range(options.repeats):
        repeat = [(mode, run(mode, options, options.steps)) for mode in (*modes, "ddp")]
        ends = [statistics.median(repeat[end][1]["times"]) for end in (0, -1)]
        ddp_steps.append(statistics.mean(ends))
        noise.append(abs(ends[0] - ends[1]) / ddp_steps[-1])
        for mode, result in repeat:
            runs[mode].append(result | {"step_to_ddp": statistics.median(result["times"]) / ddp_steps[-1]})
    mmap = {mode: run(mode, options, 0, MMAP) for mode in modes} if DEVICE is harness.Cpu else {}
    return {
        "facts": facts,
        "settings": {name: value for name, value in vars(options).items() if name != "output"}
        | {"device": DEVICE.type, "backend": DEVICE.backend, "micro_batch": MICRO_BATCH, "sequence": SEQUENCE},
        "parameters": reference["parameters"],
        "block_parameters": reference["block_parameters"],
        "root_parameters": reference["root_parameters"],
        "noise": noise,
        "single": {"losses": reference["losses"], "times": reference["times"]},
        "rows": [summarize(mode, runs[mode], mmap.get(mode), reference, options) for mode in modes],
        "not_installed": [mode for mode in options.modes if mode not in modes],
    }


def summarize(mode: str, runs: list[dict], mmap: dict | None, reference: dict, options: argparse.Namespace) -> dict:
    """A contender's row: times over all its runs, memory and bytes sent of the last one."""
    last, parameters = runs[-1], reference["parameters"]
    ideal = CONTENDERS[mode].ideal_bytes(options.precision, options.ranks)
    pairs = [pair for run in runs for pair in zip(run["losses"], reference["losses"], strict=True)]
    return {
        "mode": mode,
        "step_seconds": harness.spread([statistics.median(run["times"]) for run in runs]),
        "step_to_ddp": harness.spread([run["step_to_ddp"] for run in runs]),
        "bytes_per_parameter": {phase: each["tensors"] / parameters for phase, each in last["memory"].items()},
        "ideal_bytes_per_parameter": ideal,
        "above_ideal_bytes": last["memory"]["backward"]["tensors"] - ideal * parameters,
        "memory": last["memory"],
        "peak": last["peak"],
        "mmap": mmap and {"memory": mmap["memory"], "peak": mmap["peak"]},
        "sent_bytes": sum(last["sent"].values()),
        "sent_by_op": last["sent"],
        "losses": last["losses"],
        "max_loss_difference": max(abs(loss - expected) for loss, expected in pairs),
        "times": [run["times"] for run in runs],
    }


# --- what is written ------------------------------------------------------------------------------------------------


def title_of(report: dict) -> str:
    million = report["parameters"] / 1e6
    return f"LLaMA {million:.1f}M" + ", {precision}, {ranks} ranks, {device} ({backend})".format(**report["settings"])


def markdown(report: dict) -> str:
    settings, rows = report["settings"], report["rows"]

    def mib(values) -> str:
        return " / ".join(f"{value / MIB:.0f}" for value in values)

    def phases(memory) -> str:
        return mib(memory[phase]["used"] for phase in ("forward", "backward", "step"))

    def range_of(spread, digits) -> str:
        return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f}-{spread['max']:.{digits}f})"

    absent = [[mode, "not installed"] for mode in report["not_installed"]]
    speed = harness.markdown_table(
        ["contender", "step, s (min-max of runs)", "step / DDP", "MiB sent per rank and step", "by"],
        [
            [
                row["mode"],
                range_of(row["step_seconds"], 3),
                range_of(row["step_to_ddp"], 2),
                f"{row['sent_bytes'] / MIB:.1f}",
                ", ".join(
                    f"{name.strip('_')} {value / MIB:.1f}"
                    for name, value in row["sent_by_op"].items()
                    if value > MIB / 20
                ),
            ]
            for row in rows
        ]
        + [line + ["", "", ""] for line in absent],
    )
    memory = harness.markdown_table(
        [
            "contender",
            "bytes per parameter after forward / backward / step",
            "ideal after backward",
            "above it, MiB",
            f"{DEVICE.memory} - base, MiB",
            "peak - base, MiB",
            *([f"{DEVICE.memory} - base, freed pages returned", "peak - base, same"] if rows[0]["mmap"] else []),
        ],
        [
            [
                row["mode"],
                " / ".join(f"{value:.2f}" for value in row["bytes_per_parameter"].values()),
                f"{row['ideal_bytes_per_parameter']:.2f}",
                f"{row['above_ideal_bytes'] / MIB:.1f}",
                phases(row["memory"]),
                mib([row["peak"]]),
                *([phases(row["mmap"]["memory"]), mib([row["mmap"]["peak"]])] if row["mmap"] else []),
            ]
            for row in rows
        ],
    )
    compared = [("single", report["single"]["losses"], 0.0)]
    compared += [(row["mode"], row["losses"], row["max_loss_difference"]) for row in rows]
    losses = harness.markdown_table(
        ["contender", "largest difference to single", *(f"step {i + 1}" for i in range(len(compared[0][1])))],
        [[mode, f"{worst:.1e}", *(f"{loss:.5f}" for loss in values)] for mode, values, worst in compared],
    )
    return NOTES.format(
        facts=harness.facts_markdown(report["facts"]),
        title=title_of(report),
        block=4 * report["block_parameters"] / MIB,
        root=4 * report["root_parameters"] / MIB,
        noise=", ".join(f"{each:.0%}" for each in report["noise"]),
        speed=speed,
        memory=memory,
        losses=losses,
        warmup=WARMUP,
        **settings,
    )


NOTES = """# One data-parallel training step: {title}

{facts}

LLaMA, micro-batch {micro_batch} x {sequence} tokens per rank, one thread per rank, fused AdamW, fresh processes. bf16
means autocast over fp32 weights (single, ddp, zero_redundancy), bf16 parameters gathered from fp32 shards and an fp32
reduction (fsdp2), bf16 parameters and an fp32 master (deepspeed; zerolite, which reduces in bf16).

## Time and communication
Barrier to barrier on rank 0: median of {steps} steps after {warmup}; the median over {repeats} repeats; the ratio is to
the mean of the two DDP runs of the same repeat, which differ by {noise}. Bytes are those that a ring sends.

{speed}

## Memory per rank
Bytes per parameter are counted: live tensor storages on the device, each once, whatever Python can see (not DDP's C++
buckets, nor all that autograd saved). Ideal: the stage's formula, with nothing in flight. In flight while a pass runs,
and so in the peak: at zerolite's stages 2 and 3 two buckets of gradients, at stage 3 also the parameters of the root
({root:.1f} MiB in fp32: all that is outside the blocks; it stays from forward to backward) and of two blocks
({block:.1f} MiB each). The base is the process before the model is built.

{memory}

## Losses
{losses}
"""


def plot(report: dict, path: Path) -> None:
    rows = report["rows"]
    labels = [row["mode"] for row in rows]
    harness.bar_panels(
        path,
        title_of(report),
        [
            {
                "title": "step time / DDP",
                "labels": labels,
                "values": [row["step_to_ddp"]["median"] for row in rows],
                "marks": None,
                "legend": None,
            },
            {
                "title": "tensor bytes per parameter and rank, after backward",
                "labels": labels,
                "values": [row["bytes_per_parameter"]["backward"] for row in rows],
                "marks": [row["ideal_bytes_per_parameter"] for row in rows],
                "legend": "ideal for the stage",
            },
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="ddp is always run")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    options.modes = ["ddp", *(mode for mode in options.modes if mode != "ddp")]
    report = collect(options)
    name = f"zero_step_{options.size}_{options.precision}_{DEVICE.type}"
    target = harness.write_report(options.output, name, report, markdown(report))
    plot(report, target.with_suffix(".png"))
    print(markdown(report))


if __name__ == "__main__":
    main()
