"""What a run leaves to read: `report.md` with losses, memory and answers."""

import json
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import nn

import zerolite
from zerolite.medqa import answers, curves
from zerolite.medqa.arguments import Options
from zerolite.medqa.best import Ended
from zerolite.medqa.loss import ALL
from zerolite.medqa.machine import mib
from zerolite.medqa.processes import Processes
from zerolite.medqa.progress import METRICS, read_metrics
from zerolite.medqa.room import GRADIENT_BYTES, MASTER_BYTES, NUM_MOMENTS, ON_DEVICE, Term, bytes_of, model_states
from zerolite.medqa.tuning import PARAMETER_BYTES

if find_spec("matplotlib") is None:  # it loads after training, and that it is missing must be known before
    raise ModuleNotFoundError("the report needs matplotlib: pip install 'zerolite[train]'", name="matplotlib")

OF_GROUP = "validation_loss_"  # names of metrics.jsonl: the group behind it


def placement_line(model: nn.Module, optimizer, options: Options, processes: Processes) -> str:
    """Where a rank's model states lie before the first backward, most of any rank. Every rank must call it."""
    usage = zerolite.measure(model, optimizer)
    device_bytes = usage.parameters_bytes + usage.optimizer_bytes
    ranks = processes.gather(device_bytes, usage.host_bytes, usage.file_bytes)
    device, host, drive = (f"{mib(max(column))} MiB" for column in zip(*ranks, strict=True))
    line = f"model states of a rank before the first gradients: {device} on {processes.device.type}"
    if options.offload != "none":
        line += f", {host} in host memory" + (f", {drive} on a drive" if options.offload_path else "")
    return line


@dataclass(frozen=True)
class Memory:
    """Model states on each rank, for people, and in bytes by column: of each rank, and of the formula if one holds."""

    table: str
    ranks: list[dict[str, int]]
    formula: dict[str, int]


def memory_table(model: nn.Module, optimizer, options: Options, processes: Processes) -> Memory:
    """What model states take on each rank, counted, beside the formula. Every rank must call it, between a backward
    pass and zero_grad, since that is when the gradients exist."""
    usage = zerolite.measure(model, optimizer)
    on_device = (usage.parameters_bytes, usage.gradients_bytes, usage.optimizer_bytes)
    columns = {
        "parameters": usage.parameters_bytes,
        "gradients": usage.gradients_bytes,
        "optimizer states": usage.optimizer_bytes,
        "sum": sum(on_device),
        "of it padding": usage.padding_bytes,
        "peak on the device" if processes.device.type == "cuda" else "peak resident": processes.peak_memory_bytes(),
    }
    if options.offload != "none":
        columns["in host memory"] = usage.host_bytes
    if options.offload_path is not None:
        columns["on the drive"] = usage.file_bytes
    ranks = processes.gather(*columns.values())
    num_frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    num_trained = sum(parameter.numel() for parameter in model.parameters()) - num_frozen
    sizes = f"Φ = {num_trained:,} parameters"
    if num_frozen:
        sizes = f"Φ = {num_trained:,} trained parameters, F = {num_frozen:,} frozen ones"
    where = "" if options.offload == "none" else f", offloaded with {options.offload_states} moments"
    lines = [
        f"Model states at stage {options.stage}, {options.precision}, {options.optim}{where}, "
        f"N = {processes.world_size}, {sizes}. All in MiB; padding is part of the counted numbers.",
        "",
        f"| rank | {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
        *(f"| {rank} | " + " | ".join(map(mib, row)) + " |" for rank, row in enumerate(ranks)),
    ]
    formula: dict[str, tuple[str, float]] = {}
    if options.offload_budget is None:
        formula = _formula(options, num_trained, num_frozen, processes.world_size)
        shown = {name: f"{text} = {mib(value)}" if text else "0" for name, (text, value) in formula.items()}
        lines.append("| formula | " + " | ".join(shown.get(name, "-") for name in columns) + " |")
    return Memory(
        "\n".join([*lines, "", _note(options)]),
        [dict(zip(columns, map(int, row), strict=True)) for row in ranks],
        {name: round(value) for name, (_, value) in formula.items()},
    )


def _formula(options: Options, num_trained: int, num_frozen: int, world_size: int) -> dict[str, tuple[str, float]]:
    """Column -> (the formula, its bytes) a rank, where nothing or everything is offloaded."""

    def cell(terms: list[Term]) -> tuple[str, float]:
        parts = [(width, options.stage >= first, symbol) for width, first, symbol in terms if width]
        text = " + ".join(f"{width:g}{symbol}" + ("/N" if is_sharded else "") for width, is_sharded, symbol in parts)
        return text, bytes_of(terms, options.stage, num_trained, num_frozen, world_size)

    states = model_states(options, num_frozen > 0)
    on_device = {name: states.pop(name) for name in ON_DEVICE}
    total = [term for terms in on_device.values() for term in terms]
    columns = {**on_device, "sum": total, **states}
    return {name: cell(terms) for name, terms in columns.items()}


def _note(options: Options) -> str:
    """Which formula it is."""
    parameter, gradient = PARAMETER_BYTES[options.precision], GRADIENT_BYTES
    states = MASTER_BYTES[options.precision] + NUM_MOMENTS[options.optim] * 4
    total = parameter + gradient + states
    note = f"Unsharded, {options.precision} with {options.optim} is {parameter} + {gradient} + {states} = {total}Φ"
    if options.precision == "fp32":
        note += ": there is no master copy beside fp32 parameters."
    else:
        note += ": states hold an fp32 master copy, and gradients are summed and kept in fp32, 2Φ more than 16 bits."
    if options.is_adapter:
        note += f" A frozen parameter is {parameter} bytes and has no gradient and no states."
    if options.offload != "none":
        note += (
            " What is offloaded lies on the host: a copy of the parameters, the rest of their fp32 master, gradients, "
            "moments, and page ends and scratch, which no formula counts."
        )
    if options.offload_budget is not None:
        note += f" The first units stay on the device, as many as fit into {options.offload_budget}."
    return note


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def validation_record(losses: dict[str, float]) -> dict[str, float]:
    """Losses by group, as `validation_losses` gives them, under the names of metrics.jsonl."""
    groups = {f"{OF_GROUP}{name}": loss for name, loss in losses.items() if name != ALL}
    return {"validation_loss": losses[ALL], "validation_perplexity": perplexity(losses[ALL]), **groups}


def validation_line(losses: dict[str, float]) -> str:
    groups = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if name != ALL)
    return f"validation loss {losses[ALL]:.4f} ({groups}), perplexity {perplexity(losses[ALL]):.2f}"


def validation_table(records: list[dict]) -> str:
    """The first and the last validation of metrics.jsonl: all label tokens, then those of each language."""
    if not records:
        return "No rows were there to validate on: `--validation_file` names some, `--val_size` takes a part of yours."
    first, last = records[0], records[-1]
    keys = ["validation_loss", *(key for key in last if key.startswith(OF_GROUP))]
    names = [key.removeprefix(OF_GROUP) for key in keys[1:]]
    columns = ["", "step", "validation loss (nats a token)", "perplexity", *names]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for name, record in (("before", first), ("after", last)):
        losses = [math.nan if record.get(key) is None else record[key] for key in keys]
        cells = [f"{losses[0]:.4f}", f"{perplexity(losses[0]):.2f}", *(f"{loss:.4f}" for loss in losses[1:])]
        lines.append(f"| {name} | {record['step']} | {' | '.join(cells)} |")
    if all(first.get(key) and last[key] is not None for key in keys):
        changes = [f"{100 * (last[key] / first[key] - 1):+.1f} %" for key in keys]
        lines.append(f"| change | | {changes[0]} | | {' | '.join(changes[1:])} |")
    return "\n".join(lines)


def write(folder: Path, options: Options, about: str, trainable: str, ended: Ended, memory: Memory) -> str:
    """Write `report.md` from the metrics and the answers that lie in `folder`, `loss.png` and `memory.json`.

    about, trainable: tables in Markdown. Returns the report's text.
    """
    base = "a small LLaMA from scratch" if options.model_name_or_path is None else Path(options.model_name_or_path).name
    title = f"# Medical questions and answers: {options.finetuning_type} training of {base}, stage {options.stage}"
    records = [one for one in read_metrics(folder / METRICS) if "validation_loss" in one]
    losses = validation_table([one for one in records if one["step"] <= ended.step])
    greedy = f"Greedy answers to held-out questions, repetition penalty {answers.REPETITION_PENALTY}. {answers.NOTICE}"
    picture = "![losses, learning rate, gradient norm, tokens a second, memory](loss.png)"
    parts = [title, about, trainable, "## Losses", losses, ended.text, picture, "## Memory", memory.table]
    text = "\n\n".join([*parts, "## Answers", greedy, answers.shown(answers.read(folder))])
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    counted = {"bytes_of_each_rank": memory.ranks, "bytes_by_formula": memory.formula}
    (folder / "memory.json").write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")
    curves.plot(folder)
    return text
