"""`zerolite plan`: what training takes under each stage, offload and method, and which is the fastest that fits."""

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from zerolite.adapters.lora import add_lora
from zerolite.commands.command_line import BAD, OK, Parser, bytes_told, print_json, run, table
from zerolite.config import Precision, parse_bytes
from zerolite.memory.plan import OPTIMIZERS, TARGETS
from zerolite.memory.presets import PRESETS
from zerolite.memory.recommend import OFFLOADS, Candidate, Recommendation, recommend

METHODS: dict[str, Callable[[nn.Module], object] | None] = {"full": None, "lora": partial(add_lora, dropout=0.0)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SWITCHES = {"auto": (False, True), "on": (True,), "off": (False,)}
WRITTEN = {"none": "None", "optimizer": '"cpu"', "parameters": "zerolite.Offload(parameters=True)"}
_TOLD = f"""\
MODEL is a preset ({", ".join(PRESETS)})
or a folder with a config.json of Hugging Face; nothing is downloaded, no GPU is needed.

A row tells what one rank's device takes at most in a step, and one host: model states, activations of the
model's own code, units and buckets in flight, and the process. "ckpt" recomputes blocks in backward.
"lora" has rank 8 on the attention's Q, K and V, without dropout.

examples:
  zerolite plan llama-7b --ranks 2 --device-memory 24GiB --host-memory 128GiB
  zerolite plan llama-70b --ranks 16 --device-memory 80GiB --method lora --length 4096 --chunked-loss
  zerolite plan path/to/model --ranks 8 --stage 3 --offload none        the bytes of one configuration by kind
  zerolite plan smollm2-135m --json > plan.json

exit status: 0 something fits, 1 nothing does, 2 the command cannot be carried out"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 where something fits, 1 where nothing does, 2 for a mistake."""
    is_collecting = gc.isenabled()
    gc.disable()  # one answer, and the process ends: collecting takes a seventh of its time
    try:
        return run("plan", _plan, argv)
    finally:
        if is_collecting:
            gc.enable()


def _plan(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    device_memory = parse_bytes(options.device_memory)
    found = recommend(
        options.model,
        (options.replicas, options.ranks) if options.replicas > 1 else options.ranks,
        device_memory,
        parse_bytes(options.host_memory) if options.host_memory is not None else None,
        methods={name: METHODS[name] for name in options.method},
        stages=options.stage,
        offloads=options.offload,
        checkpointing=SWITCHES[options.checkpointing],
        precision=Precision(DTYPES[options.precision], DTYPES[options.reduce]),
        optimizer=options.optimizer,
        batch=options.batch,
        length=options.length,
        chunked_loss=options.chunked_loss,
        accumulation=options.accumulation,
        device=options.device,
        ranks_per_host=options.ranks_per_host,
    )
    if options.plot is not None:
        _plot(found, options.plot, str(options.model))
    if options.json:
        print_json(found.as_dict())
    else:
        print("\n".join(_lines(found, options)))
    return OK if found.best is not None else BAD


def _parser() -> argparse.ArgumentParser:
    parser = Parser("plan", "what training takes on each device and host, before it runs, and what fits", _TOLD)
    parser.add_argument("model", metavar="MODEL", help="a preset, or a folder with a config.json")
    parser.add_argument("--ranks", type=_count, default=8, help="ranks that shard (%(default)s)")
    parser.add_argument("--replicas", type=_count, default=1, help="groups of so many ranks, of a 2-D mesh")
    parser.add_argument("--ranks-per-host", type=_count, default=8, help="(%(default)s)")
    parser.add_argument("--device-memory", default="80GiB", metavar="BYTES", help="of one device (%(default)s)")
    parser.add_argument("--host-memory", metavar="BYTES", help="of one host, such as 512GiB; not asked where not given")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="(all)")
    parser.add_argument("--stage", nargs="+", type=int, choices=range(4), default=[0, 1, 2, 3], help="(all)")
    parser.add_argument("--offload", nargs="+", choices=OFFLOADS, default=list(OFFLOADS), help="(all)")
    parser.add_argument("--checkpointing", choices=SWITCHES, default="auto", help="of activations (%(default)s)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="of parameters (%(default)s)")
    parser.add_argument("--reduce", choices=DTYPES, default="fp32", help="of gradients (%(default)s)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="(%(default)s)")
    parser.add_argument("--batch", type=_count, default=1, help="rows of a rank's micro-batch (%(default)s)")
    parser.add_argument("--length", type=_count, default=2048, help="tokens of a row (%(default)s)")
    parser.add_argument("--chunked-loss", action="store_true", help="logits are never whole, as in train_medqa.py")
    parser.add_argument("--accumulation", type=_count, default=1, help="micro-batches a step (%(default)s)")
    parser.add_argument("--device", choices=TARGETS, default="cuda", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="every number, of every configuration")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="stacked bars of each row; needs matplotlib")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a number of at least 1, got {text!r}")
    return int(text)


def rows_of(found: Recommendation) -> list[Candidate]:
    """One candidate a method, stage and offload, in the order of the table: the better of its switches."""
    best: dict[tuple, Candidate] = {}
    for candidate in found.candidates:  # the better ones come first
        best.setdefault((candidate.method, list(OFFLOADS).index(candidate.offload), candidate.stage), candidate)
    return [best[key] for key in sorted(best, key=lambda key: (list(METHODS).index(key[0]), *key[1:]))]


def _lines(found: Recommendation, options: argparse.Namespace) -> list[str]:
    rows = rows_of(found)
    first = rows[0].plan
    lines = [f"{first.model}: {first.num_parameters / 1e9:.3g} B parameters, {first.world_size} ranks"]
    lines[0] += f", {options.batch} x {options.length} tokens a rank"
    cells = [["method", "stage", "offload", "ckpt", "device", "host", "sent/step", "s/step", ""]]
    for row in rows:
        plan = row.plan
        amounts = [bytes_told(n) for n in (plan.peak_bytes, plan.host_bytes, plan.traffic.sent_bytes)]
        fitting = "fastest that fits" if row is found.best else "fits" if row.fits else "does not fit"
        switch = "on" if row.checkpointing else "off"
        seconds = f"{plan.time.total_seconds:.3g}"
        cells.append([row.method, str(row.stage), row.offload, switch, *amounts, seconds, fitting])
    lines += ["", table(cells, right=(4, 5, 6, 7)), "", str(found).split("\n")[0]]
    if found.best is not None:
        lines.append(f"  zerolite.shard(model, stage={found.best.stage}, offload={WRITTEN[found.best.offload]})")
    detailed = found.best or found.candidates[0]
    lines += ["", *str(detailed.plan).split("\n")[1:-1], "", "assumed: " + "; ".join(detailed.plan.assumptions)]
    return lines


def _plot(found: Recommendation, path: Path, title: str) -> None:
    """Stacked bars of each row's largest peak, by kind, and a line at the device's memory."""
    try:
        import_module("matplotlib").use("Agg")
        pyplot = import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    rows = rows_of(found)
    peaks = [max(row.plan.peaks.values(), key=lambda peak: peak.total_bytes) for row in rows]
    parts = {kind: [peak.bytes_of.get(kind, 0) / 2**30 for peak in peaks] for kind in peaks[0].bytes_of}
    parts["process"] = [row.plan.overhead_bytes / 2**30 for row in rows]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
    names = [f"{row.method}, stage {row.stage}, {row.offload}" + ", ckpt" * bool(row.checkpointing) for row in rows]
    left = [0.0] * len(rows)
    for index, (kind, sizes) in enumerate(parts.items()):
        if any(sizes):
            axes.barh(names, sizes, left=left, label=kind, color=pyplot.get_cmap("tab10")(index % 10))
            left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.axvline(found.device_bytes / 2**30, color="black", linestyle="--", label="device memory")
    axes.invert_yaxis()
    axes.set(xlabel="GiB on one device at its peak", title=title, xlim=(0, None))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"written: {path}", file=sys.stderr)
