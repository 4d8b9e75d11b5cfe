"""What does offloading cost, and what does it save? A LLaMA trained with its states in host memory, and without.

zerolite with each of its choices, DeepSpeed ZeRO-Offload, FSDP2's CPUOffloadPolicy and torchao's CPUOffloadOptimizer,
where they run, beside zerolite without offload: tokens a second and their ratio ("practicality"), optimizer time that
nothing hides, device and host memory, bytes over the bus; with and without accumulation and clipping. Each run has
fresh processes. zerolite without offload runs at the start and at the end of every repeat: how far the two lie apart
is the noise, and ratios are to their mean. A timeline of two steps shows what overlaps.

    python benchmarks/offload/offload.py --model s                                # on the CPU, two ranks
    python benchmarks/offload/offload.py --model 7b --gpu-memory 24GiB            # on a GPU that may use so much memory
    python benchmarks/offload/offload.py --model 7b --gpu-memory 24GiB --largest  # how many layers of that shape train
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all benchmarks share

import harness
import psutil
import timeline
import torch
import torch.distributed as dist
from contenders import LARGE, MICRO_BATCH, OFFLOADERS, SEQUENCE, SIZES, How, batches, build_model
from harness import DEVICE, MIB

from zerolite.runtime import trace

WARMUP, WATCHED = 3, 3  # untimed steps before the timed ones, and after them, while a trace is recorded
LARGE_BATCH = (4, 1024)  # rows and tokens of a micro-batch
BASE = "zerolite"  # the mode that ratios are to
DRAWN = (BASE, "zerolite_offload", "deepspeed2_offload")  # in the timeline, where they ran
GROWN = (BASE, "zerolite_offload", "zerolite_bf16", "zerolite_int8", "zerolite_parameters")  # by --largest
OUT_OF_MEMORY = ("out of memory", "GiB of host memory", "exit code -9", "Cannot allocate memory")


# --- inside a rank --------------------------------------------------------------------------------------------------


def measure(mode: str, how: dict, model: dict, steps: int, checkpointing: bool, gpu_memory: int | None) -> dict:
    """One run on this rank: losses of all steps, times of the timed ones, memory, and what the watched ones showed."""
    offloader, how = OFFLOADERS[mode], How(**how)
    importlib.import_module(offloader.library)
    importlib.import_module("transformers.models.llama.modeling_llama")
    base_pss, base_available = harness.pss_bytes(), psutil.virtual_memory().available
    limit_memory(gpu_memory if offloader.builds_on_meta else None)
    on = None if model["size"] in SIZES else "meta" if offloader.builds_on_meta else DEVICE.type
    llama = build_model(**model, on=on)
    parameters = sum(parameter.numel() for parameter in llama.parameters())
    if checkpointing:
        llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    training = offloader.build(llama, how)
    limit_memory(gpu_memory)
    rank, world = dist.get_rank(), dist.get_world_size()
    joint = how.micro_batch * how.accumulation * world
    data = iter(batches(WARMUP + steps + WATCHED + 1, rank, world, joint, model["sequence"]))
    losses, memory = [], {}

    def step(look=lambda: None):
        loss_sum = 0.0
        for ids in next(data).chunk(how.accumulation):
            with phase("forward"):
                loss = training.forward(ids)
            with phase("backward"):
                training.backward(loss)
            loss_sum = loss_sum + loss.detach()
            del loss
        losses.append(loss_sum / how.accumulation)
        look()
        with phase("step"):
            training.step()

    def look():
        memory["pss"] = harness.pss_bytes() - base_pss
        memory["taken"] = base_available - psutil.virtual_memory().available
        memory["states"] = model_states(llama, training)

    for _ in range(WARMUP):
        step()
    DEVICE.reset_peak()
    times = [harness.seconds(step) for _ in range(steps)]
    memory["peak"] = DEVICE.peak_bytes() if DEVICE is harness.Cuda else None
    spans = watch(step, getattr(llama, "_zerolite", None))
    with harness.BusBytes() as bus:
        step(look)
    if hasattr(llama, "_zerolite"):
        bus_bytes = {row: sum(s.nbytes for s in spans if s.row == row) / WATCHED for row in ("down", "up")}
    else:
        bus_bytes = {"down": bus.down, "up": bus.up} if DEVICE is harness.Cuda else None
    return {
        "parameters": parameters,
        "times": times,
        "losses": [loss.item() for loss in losses],
        "memory": memory,
        "bus": bus_bytes,
        "exposed": {name: value / WATCHED for name, value in timeline.exposed(spans).items()},
        "spans": [dataclasses.astuple(span) for span in timeline.last_steps(spans, WATCHED - 1)],
    }


@contextlib.contextmanager
def phase(name: str):
    """A part of the step; while steps are watched, what the device does of it is waited for."""
    with trace.phase(timeline.LOOP, name):
        yield
        if trace.recording is not None:
            DEVICE.synchronize()


def watch(step, engine) -> list[timeline.Span]:
    """Run the watched steps; what the trace says of them. engine: of a model that zerolite has sharded."""
    with tempfile.TemporaryDirectory(prefix="zerolite-trace-") as folder:
        trace.start(folder)
        for _ in range(WATCHED):
            step()
        if engine is not None and engine.placement.host is not None:
            engine.placement.host.wait(engine.placement.host.pool.submitted)
        trace.stop()
        return timeline.read(Path(folder), dist.get_rank())


def limit_memory(nbytes: int | None) -> None:
    """Let this process have so much of its GPU's memory; what building left in torch's cache goes back first."""
    if nbytes is not None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total))


def model_states(model: torch.nn.Module, training) -> dict | None:
    """Bytes of zerolite's model states on the device and on the host, counted between backward and step."""
    if not hasattr(model, "_zerolite"):
        return None
    import zerolite

    usage = zerolite.measure(model, training.optimizer)
    device = usage.parameters_bytes + usage.gradients_bytes + usage.optimizer_bytes
    return {"device": device, "host": usage.host_bytes}


# --- over the runs --------------------------------------------------------------------------------------------------


def run(mode: str, how: How, options: argparse.Namespace, layers: int | None = None, steps: int | None = None) -> dict:
    """Launch one mode and fold its ranks: rank 0's times, the mean loss, the most memory of any rank; or why not."""
    offloader = OFFLOADERS[mode]
    if importlib.util.find_spec(offloader.library) is None:
        return {"reason": f"{offloader.library} is not installed"}
    if reason := offloader.refuses(how, options.ranks):
        return {"reason": reason}
    arguments = {
        "mode": mode,
        "how": dataclasses.asdict(how),
        "model": {"size": options.model, "sequence": options.sequence, "layers": layers or options.layers},
        "steps": options.steps if steps is None else steps,
        "checkpointing": options.checkpointing,
        # What offloads nothing gets the whole GPU: it is what the others are compared with.
        "gpu_memory": options.gpu_memory if offloader.base is not None or layers else None,
    }
    threads = max(1, len(os.sched_getaffinity(0)) // options.ranks)
    try:
        ranks = harness.launch(measure, arguments, options.ranks, {"OMP_NUM_THREADS": str(threads)})
    except harness.RankError as error:
        return {"reason": reason_of(error), "is_out_of_memory": any(mark in str(error) for mark in OUT_OF_MEMORY)}

    def most(of) -> float | None:
        values = [of(rank) for rank in ranks]
        return None if None in values else max(values)

    return ranks[0] | {
        "losses": [statistics.mean(step) for step in zip(*(rank["losses"] for rank in ranks), strict=True)],
        "memory": {
            "peak": most(lambda rank: rank["memory"]["peak"]),
            "pss": most(lambda rank: rank["memory"]["pss"]),
            "taken": ranks[0]["memory"]["taken"],
            "states": ranks[0]["memory"]["states"],
        },
    }


def reason_of(error: harness.RankError) -> str:
    """The last line that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if re.match(r"\s*[\w.]*(Error|Exception)\b", line)]
    text = (lines or str(error).splitlines())[-1]
    return text if len(text) <= 240 else text[:237] + "..."


def collect(options: argparse.Namespace) -> dict:
    """Every setting, repeats interleaved; what the JSON file holds."""
    facts = harness.machine_facts(("torch", "transformers", "deepspeed", "torchao"))
    tables, reference = [], None
    for accumulation in options.accumulation:
        for clip in options.clip:
            how = How(
                options.precision,
                accumulation,
                clip or None,
                options.micro_batch,
                options.workers,
                options.threads,
            )
            runs, noise, absent = {mode: [] for mode in options.modes}, [], {}
            for _ in range(options.repeats):
                noise += one_repeat(how, options, runs, absent)
            present = [mode for mode in options.modes if runs[mode]]
            reference = reference or (runs[present[0]][0] if present else None)
            tables.append(
                {
                    "accumulation": accumulation,
                    "clip": clip,
                    "noise": noise,
                    "absent": absent,
                    "rows": [summarize(mode, runs, how, options) for mode in present],
                    "spans": {mode: runs[mode][-1]["spans"] for mode in DRAWN if runs.get(mode)},
                }
            )
    return {
        "facts": facts,
        "settings": {name: value for name, value in vars(options).items() if name != "output"}
        | {"device": DEVICE.type, "backend": DEVICE.backend, "warmup": WARMUP, "watched": WATCHED},
        "parameters": reference and reference["parameters"],
        "tables": tables,
    }


def one_repeat(how: How, options: argparse.Namespace, runs: dict[str, list], absent: dict[str, str]) -> list[float]:
    """Run every mode once, the base twice; how far its two runs lie apart, relative to their mean."""
    done: list[tuple[str, dict]] = []
    for mode in (*options.modes, BASE):
        if mode in absent:
            continue
        result = run(mode, how, options)
        if "reason" in result:
            absent[mode] = result["reason"]
            print(f"{mode:20} did not run: {absent[mode]}", flush=True)
            continue
        step = statistics.median(result["times"])
        print(f"{mode:20} x {how.accumulation}, clip {how.clip}: {step:8.3f} s a step", flush=True)
        done.append((mode, result | {"step": step}))
    steps = {mode: statistics.mean(r["step"] for m, r in done if m == mode) for mode, _ in done}
    for mode, result in done:
        own = OFFLOADERS[mode].base
        runs[mode].append(
            result
            | {"practicality": steps[BASE] / result["step"] if BASE in steps else None}
            | {"own_practicality": steps[own] / result["step"] if own in steps else None}
        )
    ends = [result["step"] for mode, result in done if mode == BASE]
    return [abs(ends[0] - ends[-1]) / steps[BASE]] if len(ends) == 2 else []


def summarize(mode: str, runs: dict[str, list[dict]], how: How, options: argparse.Namespace) -> dict:
    """A mode's row: times over all its runs, memory and bytes of the last one."""
    mine, last = runs[mode], runs[mode][-1]
    tokens = how.micro_batch * how.accumulation * options.sequence * options.ranks
    reference = runs[BASE][0]["losses"] if runs.get(BASE) else None

    def ratios(name: str) -> dict | None:
        values = [each[name] for each in mine if each[name] is not None]
        return harness.spread(values) if values else None

    return {
        "mode": mode,
        "step_seconds": harness.spread([each["step"] for each in mine]),
        "tokens_per_second": tokens / statistics.median(each["step"] for each in mine),
        "practicality": ratios("practicality"),
        "own_practicality": ratios("own_practicality"),
        "exposed_seconds": {
            name: statistics.median(each["exposed"][name] for each in mine) for name in ("step", "forward", "workers")
        },
        "memory": last["memory"],
        "bus_bytes": last["bus"],
        "max_loss_difference": reference
        and max(abs(loss - expected) for loss, expected in zip(last["losses"], reference, strict=True)),
        "losses": last["losses"],
        "times": [each["times"] for each in mine],
    }


# --- the largest model ----------------------------------------------------------------------------------------------


def largest(options: argparse.Namespace) -> dict:
    """For each way to keep states, how many layers of the model's shape train; every try in fresh processes."""
    facts = harness.machine_facts(("torch", "transformers"))
    how = How(options.precision, 1, 1.0, options.micro_batch, options.workers, options.threads)
    rows = []
    for mode in (mode for mode in GROWN if mode in options.modes):
        tried: dict[int, dict] = {}

        def trains(layers: int, mode: str = mode, tried: dict = tried) -> bool:
            result = tried[layers] = run(mode, how, options, layers, steps=1)
            if "reason" in result and not result.get("is_out_of_memory"):
                raise SystemExit(f"{mode} with {layers} layers failed, and not for want of memory: {result['reason']}")
            print(f"{mode:20} {layers:4} layers: {result.get('reason', 'trains')}", flush=True)
            return "reason" not in result

        most = grow(trains, options.most_layers)
        row = {"mode": mode, "layers": most, "tried": {layers: r.get("reason") for layers, r in sorted(tried.items())}}
        if most:
            row |= {name: tried[most][name] for name in ("parameters", "times", "memory")}
        rows.append(row)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    return {"facts": facts, "settings": settings | {"device": DEVICE.type}, "rows": rows}


def grow(trains, most: int) -> int:
    """The largest number up to `most` for which trains(number), to a sixteenth; 0 where not even one."""
    good, bad, number = 0, most + 1, min(8, most)
    while bad - good > max(1, good // 16):
        if trains(number):
            good = number
        else:
            bad = number
        number = min(2 * good, most) if good and bad > most else (good + bad) // 2
        if number <= good:
            break
    return good


# --- what is written ------------------------------------------------------------------------------------------------


def title_of(report: dict) -> str:
    settings = report["settings"]
    shape = (
        f"LLaMA {(report['parameters'] or 0) / 1e6:.1f}M" if "parameters" in report else f"shape of {settings['model']}"
    )
    limit = f", {settings['gpu_memory'] / 2**30:g} GiB of it" if settings["gpu_memory"] else ""
    return f"{shape}, {settings['precision']}, {settings['ranks']} ranks, {settings['device']}{limit}"


def markdown(report: dict) -> str:
    settings = report["settings"]
    parts = [
        NOTES.format(
            facts=harness.facts_markdown(report["facts"]),
            title=title_of(report),
            recomputed=", activations recomputed" if settings["checkpointing"] else "",
            **settings,
        )
    ]
    for table in report["tables"]:
        noise = ", ".join(f"{each:.0%}" for each in table["noise"]) or "unknown"
        clip = f"clipped to {table['clip']:g}" if table["clip"] else "not clipped"
        parts.append(f"## {table['accumulation']} micro-batches a step, {clip}\nNoise {noise}.\n")
        parts.append(table_of(table))
        parts += [f"{mode} did not run: {reason}." for mode, reason in table["absent"].items()]
        parts.append("")
    return "\n".join(parts)


def table_of(table: dict) -> str:
    def ratio(spread: dict | None) -> str:
        return "-" if spread is None else f"{spread['median']:.2f} ({spread['min']:.2f}-{spread['max']:.2f})"

    def mib(value: float | None) -> str:
        return "-" if value is None else f"{value / MIB:.0f}"

    header = ["mode", "step, s", "tokens/s", "practicality", "to its own base", "step() + waits in forward, s"]
    header += ["of it for workers, s", "device MiB", "states on the host, MiB", "PSS above base, MiB"]
    header += ["taken from the machine, MiB"] if DEVICE is harness.Cuda else []
    header += ["bus MiB a step, down / up", "loss difference"]
    lines = []
    for row in table["rows"]:
        exposed, memory, bus = row["exposed_seconds"], row["memory"], row["bus_bytes"]
        states = memory["states"] or {"device": None, "host": None}
        lines.append(
            [
                row["mode"],
                f"{row['step_seconds']['median']:.3f}",
                f"{row['tokens_per_second']:.0f}",
                ratio(row["practicality"]),
                ratio(row["own_practicality"]),
                f"{exposed['step']:.3f} + {exposed['forward']:.3f}",
                f"{exposed['workers']:.3f}" if row["mode"].startswith("zerolite_") else "-",
                mib(states["device"] if memory["peak"] is None else memory["peak"]),
                mib(states["host"]),
                mib(memory["pss"]),
                *([mib(memory["taken"])] if DEVICE is harness.Cuda else []),
                "-" if bus is None else f"{mib(bus['down'])} / {mib(bus['up'])}",
                "-" if row["max_loss_difference"] is None else f"{row['max_loss_difference']:.1e}",
            ]
        )
    return harness.markdown_table(header, lines)


NOTES = """# What offloading costs: {title}

{facts}

LLaMA, micro-batch {micro_batch} x {sequence} tokens per rank{recomputed}, AdamW, every library with the same number
of threads, fresh processes. Each micro-batch is reduced, and goes to the host, by itself. Step: barrier to barrier on
rank 0, median of {steps} steps after {warmup}; the median over {repeats} repeats. Practicality: step time of zerolite
without offload, the mean of its two runs in the same repeat, over this one's; "to its own base" takes the same
library without offload.

step() and waits are of {watched} more steps, in which the device is waited for after every phase: time in
`optimizer.step`, and from when a block could begin to when its parameters are there (gathers between ranks included,
so zerolite without offload has some too). For other libraries only step() is seen. Device: on a GPU the peak that
torch handed out; on the CPU, where host and device are one memory, the model states counted as the device's between
backward and step. PSS: of a rank and its workers, between backward and step; it may miss what CUDA allocated pinned.
Loss difference: the largest of any step to zerolite without offload. bf16: zerolite and DeepSpeed keep an fp32
master, FSDP2 shards fp32 and gathers bf16, torchao keeps nothing beside bf16. What offloads nothing has the whole
GPU, also with --gpu-memory. Timeline: the .png beside this file.
"""


def largest_markdown(report: dict) -> str:
    rows = []
    for row in report["rows"]:
        if not row["layers"]:
            rows.append([row["mode"], 0, "-", "-", "-", "-"])
            continue
        memory = row["memory"]
        peak = "-" if memory["peak"] is None else f"{memory['peak'] / 2**30:.1f}"
        cells = [f"{row['parameters'] / 1e9:.2f}", peak, f"{memory['pss'] / 2**30:.1f}", f"{row['times'][0]:.2f}"]
        rows.append([row["mode"], row["layers"], *cells])
    header = ["mode", "layers", "billion parameters", "device peak, GiB", "PSS a rank, GiB", "step, s"]
    facts, table = harness.facts_markdown(report["facts"]), harness.markdown_table(header, rows)
    settings = report["settings"]
    return f"""# The largest LLaMA that trains, by its number of layers: {title_of(report)}

{facts}

Micro-batch {settings["micro_batch"]} x {settings["sequence"]} tokens, clipped; to a sixteenth of the number of layers.

{table}
"""


def main() -> None:
    is_gpu = DEVICE is harness.Cuda
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SIZES, *LARGE], default="s")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16" if is_gpu else "fp32")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if is_gpu else 2)
    parser.add_argument(
        "--micro-batch", type=int, help=f"rows (default: {MICRO_BATCH}, of large models {LARGE_BATCH[0]})"
    )
    parser.add_argument("--sequence", type=int, help=f"tokens (default: {SEQUENCE}, of large models {LARGE_BATCH[1]})")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--clip", type=float, nargs="+", default=[1.0, 0.0], help="global norms; 0: not clipped")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=None, help="recompute blocks")
    parser.add_argument("--gpu-memory", help="of each GPU for those that offload, such as 24GiB")
    parser.add_argument("--workers", type=int, help="optimizer processes a rank of zerolite's")
    parser.add_argument("--threads", type=int, help="of each of them")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--modes", nargs="+", choices=OFFLOADERS, default=list(OFFLOADERS), help=f"{BASE} is always run"
    )
    parser.add_argument("--largest", action="store_true", help="grow the number of layers instead")
    parser.add_argument("--most-layers", type=int, default=512, help="with --largest, no more than these")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    batch = LARGE_BATCH if options.model in LARGE else (MICRO_BATCH, SEQUENCE)
    options.micro_batch, options.sequence = options.micro_batch or batch[0], options.sequence or batch[1]
    if options.checkpointing is None:
        options.checkpointing = options.model in LARGE
    if options.gpu_memory is not None:
        if not is_gpu:
            parser.error("--gpu-memory limits a GPU, there is none")
        from zerolite.config import parse_bytes

        options.gpu_memory = parse_bytes(options.gpu_memory)
    options.modes = [BASE, *(mode for mode in options.modes if mode != BASE)]
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / f"offload_{options.model}_{options.precision}_{DEVICE.type}"
    if options.largest:
        report = largest(options)
        target, text = target.with_name(target.name + "_largest"), largest_markdown(report)
    else:
        report = collect(options)
        text = markdown(report)
        panels = report["tables"][0]["spans"]
        spans = {mode: [timeline.Span(*span) for span in panels[mode]] for mode in panels}
        if spans:
            timeline.draw(target.with_suffix(".png"), f"Two steps: {title_of(report)}", spans)
    harness.write_report(options.output, target.name, report, text)
    print(text)


if __name__ == "__main__":
    main()
