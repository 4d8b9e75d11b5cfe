"""Where does a rank's memory go, in whose hands, and does the plan know it? Peak bytes by kind, planned and measured.

DDP; zerolite's stages 0 to 3 without offload, with the optimizer or the parameters in host memory, and each with LoRA;
FSDP2, DeepSpeed, PEFT and torchao: the same LLaMA and data, each in fresh processes. Beside what was measured stand
the figure of `zerolite.plan` and the formula (16 bytes a parameter, divided as the stage divides), and a step's time
over DDP's. Contenders run in groups; DDP runs before and after each, and a ratio is to the mean of those two.

    python benchmarks/memory/memory.py --model s                       # two ranks, on the CPU where there is no GPU
    python benchmarks/memory/memory.py --model 1b --device cuda --modes zerolite2 zerolite3-parameters fsdp2
    python benchmarks/memory/memory.py --model tiny --scale            # no figure over world size
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all benchmarks share

import harness
import memory_report
import torch
import torch.distributed as dist
from configurations import CONFIGURATIONS, add_lora, placement_of, precision_of
from contenders import LARGE, MICRO_BATCH, SEQUENCE, SIZES, batches, build_model
from harness import DEVICE
from live_log import LiveLog

from zerolite.memory import plan as zerolite_plan
from zerolite.memory import presets
from zerolite.memory.plan import Plan
from zerolite.memory.presets import PRESETS, language_model_step
from zerolite.memory.subject import Inputs, Subject

WARMUP = 1  # step before the one whose memory is read, and again before the timed ones
COMPILE_SECONDS = 900  # that DeepSpeed's operations may take, once
SCALED = ("ddp", "zerolite1", "zerolite2", "zerolite3", "fsdp2")  # over world size


@dataclass(frozen=True)
class Work:
    """What all contenders train alike; `size`: of contenders.py, or a preset of zerolite."""

    size: str
    precision: str = "bf16"
    micro_batch: int = MICRO_BATCH
    sequence: int = SEQUENCE
    checkpointing: bool = False
    chunked_loss: bool = False  # for zerolite alone

    @property
    def is_small(self) -> bool:
        """Whether every rank can draw it whole in host memory first, so that all contenders have the same values."""
        return self.size in (*SIZES, "smollm2-135m")

    def build(self, on: str | None) -> torch.nn.Module:
        """In fp32; `on` the meta device without values."""
        if self.size in PRESETS:
            empty = presets.build(self.size)
            with torch.device(on or "cpu"):
                model = type(empty)(empty.config).to(on or DEVICE.type)
        else:
            model = build_model(self.size, self.sequence, on=on)
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()


# --- inside a rank --------------------------------------------------------------------------------------------------


def measure(mode: str, steps: int, work: dict) -> dict:
    """One contender on this rank: bytes of one step by kind, then times of `steps` steps without the counter."""
    work = Work(**work)
    configuration = CONFIGURATIONS[mode]
    importlib.import_module(configuration.library)
    importlib.import_module("transformers.models.llama.modeling_llama")
    rank, world = dist.get_rank(), dist.get_world_size()
    data = iter(batches(2 * WARMUP + 1 + steps, rank, world, work.micro_batch * world, work.sequence))
    base_pss, log = harness.pss_bytes(), LiveLog(DEVICE.type)
    base = DEVICE.used_bytes() if DEVICE is harness.Cuda else 0
    losses, found = [], {}

    def step(look=lambda: None):
        log.phase = "forward"
        loss = training.forward(next(data))
        log.end_phase()
        log.phase = "backward"
        training.backward(loss)
        losses.append(loss.detach().item())
        del loss
        log.end_phase()
        look()
        log.phase = "step"
        training.step()

    def look():
        found["pss"] = harness.pss_bytes() - base_pss
        found["usage"] = usage_of(model, training.optimizer)

    with log:
        on = None if work.is_small else "meta" if configuration.builds_on_meta else DEVICE.type
        model = work.build(on)
        training = configuration.build(model, work.precision)
        if work.chunked_loss:  # logits are never whole, as train_medqa.py does it
            chunked = language_model_step(work.micro_batch, work.sequence, is_chunked=True)
            training.forward = lambda ids: chunked(model)
        for _ in range(WARMUP):
            step()
        DEVICE.synchronize()
        if DEVICE is harness.Cuda:
            DEVICE.reset_peak()
        log.begin()
        step(look)
        found |= {"peak": log.peak(), "states": log.states_bytes()}
        found["allocated"] = DEVICE.peak_bytes() - base if DEVICE is harness.Cuda else None
    for _ in range(WARMUP if steps else 0):
        step()
    return found | {
        "losses": losses,
        "times": [harness.seconds(step) for _ in range(steps)],
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


def usage_of(model: torch.nn.Module, optimizer) -> dict | None:
    """What `zerolite.measure` says now, of a model that zerolite has sharded. Bytes."""
    import zerolite

    return dict(vars(zerolite.measure(model, optimizer))) if hasattr(model, "_zerolite") else None


# --- what was expected ----------------------------------------------------------------------------------------------


@functools.cache
def subject_of(work: Work, is_lora: bool) -> Subject:
    return Subject(work.build("meta"), add_lora if is_lora else None)


def plan_of(mode: str, ranks: int, work: Work, device: str) -> Plan:
    """What `zerolite.plan` says of a mode of zerolite on so many ranks."""
    configuration = CONFIGURATIONS[mode]
    return zerolite_plan.plan_of(
        subject_of(work, configuration.is_lora),
        configuration.stage,
        ranks,
        placement_of(configuration.offload),
        precision_of(work.precision),
        inputs=Inputs(work.micro_batch, work.sequence, work.checkpointing, work.chunked_loss),
        device=device,
    )


def planned(mode: str, ranks: int, work: Work) -> dict | None:
    """The plan in the benchmark's kinds; None for zerolite's peers."""
    if not CONFIGURATIONS[mode].is_planned:
        return None
    found = plan_of(mode, ranks, work, DEVICE.type)
    phase = max(found.peaks, key=lambda name: found.peaks[name].total_bytes)
    kinds = dict(found.peaks[phase].bytes_of)
    activations = kinds.pop("activations") + kinds.pop("logits")
    states = sum(kinds.pop(kind) for kind in ("parameters", "master", "moments"))
    gradients = kinds.pop("gradients")
    return {
        "peak": {
            "states": states,
            "gradients": gradients,
            "activations": activations,
            "in flight": sum(kinds.values()),
        },
        "states": found.states_bytes,
        "arena": found.arena_bytes,
    }


# --- over the runs --------------------------------------------------------------------------------------------------


def run(mode: str, ranks: int, work: Work, steps: int, launching: dict) -> dict:
    """Launch one mode: a row of the report, with what every rank measured, or with the reason why it did not run.

    launching: `env` and `timeout` of `harness.launch`.
    """
    configuration = CONFIGURATIONS[mode]
    subject = subject_of(work, configuration.is_lora)
    num_trainable = subject.numel(only_trainable=True)
    row = {
        "mode": mode,
        "ranks": ranks,
        "formula": configuration.formula(work.precision, ranks, subject.numel() - num_trainable, num_trainable),
        "plan": planned(mode, ranks, work),
        # On the CPU the host's memory is the device's: what a peer offloads is counted with the rest.
        "counts_host": DEVICE is harness.Cpu and configuration.offload != "none" and not configuration.is_planned,
    }
    reason = configuration.refuses(ranks)
    if importlib.util.find_spec(configuration.library) is None:
        reason = f"{configuration.library} is not installed"
    if not reason:
        arguments = {"mode": mode, "steps": steps, "work": dataclasses.asdict(work)}
        try:
            row["by_rank"] = harness.launch(measure, arguments, ranks, **launching)
        except harness.RankError as error:
            reason = memory_report.reason_of(str(error))
    if reason:
        print(f"{mode:26} x {ranks} did not run: {reason}", flush=True)
        return row | {"reason": reason}
    times = row["by_rank"][0]["times"]
    row["step_seconds"] = statistics.median(times) if times else None
    most = max(row["by_rank"], key=lambda rank: sum(rank["peak"].values()))
    row |= {name: most[name] for name in ("peak", "states", "allocated", "usage")}
    row["pss"] = max(rank["pss"] for rank in row["by_rank"])
    print(f"{mode:26} x {ranks} {sum(row['peak'].values()) / 2**20:8.1f} MiB at most", flush=True)
    return row


def rounds(options: argparse.Namespace, work: Work, launching: dict, done: dict[str, dict]) -> Iterator[dict]:
    """Every mode in its group, DDP before and after each group; rows with a ratio to the mean of those two.

    done: rows of an earlier run, by mode, which come first as they are.
    """

    def timed(mode: str) -> dict:
        return run(mode, options.ranks, work, options.steps, launching)

    yield from done.values()
    first = timed("ddp")
    if "ddp" not in done:
        yield first | {"step_to_ddp": 1.0 if first.get("step_seconds") else None, "noise": None}
    for group in grouped([mode for mode in options.modes if mode not in {"ddp", *done}], options.group):
        rows = [timed(mode) for mode in group]
        last = timed("ddp")
        ends = [end["step_seconds"] for end in (first, last) if end.get("step_seconds")]
        for row in rows:
            ratio = row["step_seconds"] / statistics.mean(ends) if ends and row.get("step_seconds") else None
            noise = abs(ends[0] - ends[1]) / statistics.mean(ends) if len(ends) == 2 else None
            yield row | {"step_to_ddp": ratio, "noise": noise}
        first = last


def grouped(modes: list[str], size: int) -> list[list[str]]:
    return [modes[start : start + size] for start in range(0, len(modes), size)]


def collect(options: argparse.Namespace, earlier: dict | None) -> Iterator[dict]:
    """What the JSON file holds, after every group and every world size; earlier: such a file, whose rows are kept."""
    facts = harness.machine_facts(("torch", "transformers", "deepspeed", "peft", "torchao"))
    work = Work(options.model, options.precision, options.micro_batch, options.sequence, options.checkpointing)
    scaled = [mode for mode in SCALED if mode in options.modes] if options.scale else []
    report = {
        "facts": facts,
        "earlier_facts": [earlier["facts"], *earlier["earlier_facts"]] if earlier else [],
        "settings": settings_of(options, work),
        "parameters": subject_of(work, False).numel(),
        "rows": [],
        "over_ranks": [row for row in earlier["over_ranks"] if "reason" not in row] if earlier else [],
        "planned_over_ranks": [
            {"mode": mode, "ranks": ranks, "plan": planned(mode, ranks, work)}
            for mode in scaled
            if CONFIGURATIONS[mode].is_planned
            for ranks in (1, 2, 4, 8, 16, 32, 64)
        ],
    }
    done = {row["mode"]: row for row in earlier["rows"] if "reason" not in row} if earlier else {}
    with tempfile.TemporaryDirectory(prefix="zerolite-ops-") as fresh:
        # Not torch's own folder: a lock that a killed build has left there would hang all.
        ops = os.environ.get("TORCH_EXTENSIONS_DIR", fresh)
        launching = {"env": {"TORCH_EXTENSIONS_DIR": ops}, "timeout": options.timeout}
        if any(CONFIGURATIONS[mode].library == "deepspeed" and mode not in done for mode in options.modes):
            # One process compiles what the others load.
            run("deepspeed3-offload", 1, Work("tiny"), 0, launching | {"timeout": COMPILE_SECONDS})
        for row in rounds(options, work, launching, done):
            report["rows"].append(row)
            yield report
        have = {(row["mode"], row["ranks"]) for row in report["over_ranks"]}
        report["over_ranks"] += [
            row for row in report["rows"] if row["mode"] in scaled and (row["mode"], row["ranks"]) not in have
        ]
        for ranks in options.scale:
            for mode in scaled:
                if ranks != options.ranks and (mode, ranks) not in have:
                    report["over_ranks"].append(run(mode, ranks, work, 0, launching))
                    yield report
    order = list(CONFIGURATIONS)
    report["rows"].sort(key=lambda row: order.index(row["mode"]))
    yield report


def settings_of(options: argparse.Namespace, work: Work) -> dict:
    """What rows of two runs must have in common."""
    shown = ("ranks", "steps", "group", "scale")
    device = {"device": DEVICE.type, "backend": DEVICE.backend}
    return dataclasses.asdict(work) | {name: getattr(options, name) for name in shown} | device


def main() -> None:
    is_gpu = DEVICE is harness.Cuda
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SIZES, *LARGE, *PRESETS], default="s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE.type)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if is_gpu else 2)
    parser.add_argument("--scale", type=int, nargs="*", help="world sizes of the second figure (default: 1, 2 and 4)")
    parser.add_argument("--micro-batch", type=int, default=MICRO_BATCH, help="rows")
    parser.add_argument("--sequence", type=int, default=SEQUENCE, help="tokens")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in backward")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run")
    parser.add_argument("--group", type=int, default=8, help="contenders between two runs of DDP")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one contender may take")
    parser.add_argument(
        "--modes", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), help="ddp is always run"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows of the file that an earlier run has left")
    parser.add_argument("--label", default="", help="what the files' name ends with, such as _peers")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    if options.device == "cuda" and not is_gpu:
        parser.error("--device cuda: torch sees no GPU")
    if options.device == "cpu" and is_gpu:  # the device is decided when torch is first asked
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    options.modes = ["ddp", *(mode for mode in options.modes if mode != "ddp")]
    if options.scale is None:
        options.scale = [ranks for ranks in (1, 2, 4) if not is_gpu or ranks <= torch.cuda.device_count()]
    name = f"memory_{options.model}_{options.precision}_{DEVICE.type}{options.label}"
    file, earlier = options.output / f"{name}.json", None
    if options.resume and file.is_file():
        earlier = json.loads(file.read_text())
        work = Work(options.model, options.precision, options.micro_batch, options.sequence, options.checkpointing)
        if earlier["settings"] != (now := settings_of(options, work)):
            parser.error(f"--resume: {file.name} is of {earlier['settings']}, this would be {now}")
    for report in collect(options, earlier):
        harness.write_report(options.output, name, report, memory_report.markdown(report))
    memory_report.draw(file.with_suffix(".png"), report)
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
