"""What a run leaves to read: `report.md` with perplexity, memory and answers, and `loss.png`."""

import math
from importlib.util import find_spec
from pathlib import Path

from torch import nn

import zerolite
from zerolite.medqa import answers
from zerolite.medqa.arguments import Options
from zerolite.medqa.loss import ALL
from zerolite.medqa.processes import Processes
from zerolite.medqa.progress import METRICS, read_metrics
from zerolite.medqa.tuning import PARAMETER_BYTES

if find_spec("matplotlib") is None:  # it loads after training, and that it is missing must be known before
    raise ModuleNotFoundError("the report needs matplotlib: pip install 'zerolite[train]'", name="matplotlib")

# Bytes a parameter. States are one or two moments; 16-bit parameters add an fp32 master copy, of which the host keeps
# only the half that a bf16 parameter has not.
NUM_MOMENTS = {"adamw": 2, "adam": 2, "lamb": 2, "lion": 1}
MASTER_BYTES = {"fp32": 0, "bf16": 4, "fp16": 4}
HOST_MASTER_BYTES = {"fp32": 0, "bf16": 2, "fp16": 4}
MOMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1 + 4 / 128}
OF_GROUP = "validation_loss_"  # names of metrics.jsonl: the group behind it
GRADIENT_BYTES = 4  # reduced and kept in fp32, at every precision


def placement_line(model: nn.Module, optimizer, options: Options, processes: Processes) -> str:
    """Where a rank's model states lie before the first backward, most of any rank. Every rank must call it."""
    usage = zerolite.measure(model, optimizer)
    device_bytes = usage.parameters_bytes + usage.optimizer_bytes
    ranks = processes.gather(device_bytes, usage.host_bytes, usage.file_bytes)
    device, host, drive = (f"{max(column) / 2**20:,.1f} MiB" for column in zip(*ranks, strict=True))
    line = f"model states of a rank before the first gradients: {device} on {processes.device.type}"
    if options.offload != "none":
        line += f", {host} in host memory" + (f", {drive} on a drive" if options.offload_path else "")
    return line


def memory_table(model: nn.Module, optimizer, options: Options, processes: Processes) -> str:
    """Bytes of model states on each rank, counted, beside the formula. Every rank must call it, between a backward
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
        f"N = {processes.world_size}, {sizes}. All in bytes; padding is part of the counted numbers.",
        "",
        f"| rank | {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
        *(f"| {rank} | " + " | ".join(f"{int(cell):,}" for cell in row) + " |" for rank, row in enumerate(ranks)),
    ]
    if options.offload_budget is None:
        cells = {name: "-" for name in columns} | _formula(options, num_trained, num_frozen, processes.world_size)
        lines.append("| formula | " + " | ".join(cells.values()) + " |")
    return "\n".join([*lines, "", _note(options)])


def _formula(options: Options, num_trained: int, num_frozen: int, world_size: int) -> dict[str, str]:
    """Column -> "formula = bytes", a rank, where nothing or everything is offloaded."""
    parameter, master = PARAMETER_BYTES[options.precision], MASTER_BYTES[options.precision]
    moments = NUM_MOMENTS[options.optim] * MOMENT_BYTES[options.offload_states]
    stays_whole = 4  # adapters are never sharded

    def cell(*terms: tuple[float, int, str]) -> str:
        """Of (bytes a parameter, the stage from which they are sharded, Φ or F)."""
        widths = [(width, options.stage >= sharded_from, symbol) for width, sharded_from, symbol in terms if width]
        numel = {"Φ": num_trained, "F": num_frozen}
        text = " + ".join(f"{width:g}{symbol}" + ("/N" if is_sharded else "") for width, is_sharded, symbol in widths)
        value = sum(width * numel[symbol] / (world_size if is_sharded else 1) for width, is_sharded, symbol in widths)
        return f"{text} = {value:,.0f}" if text else "0"

    frozen = [(parameter, 3, "F")] if num_frozen else []
    trained = (parameter, stays_whole if options.is_adapter else 3, "Φ")
    on_device = {
        "parameters": [trained, *frozen],
        "gradients": [(GRADIENT_BYTES, 2, "Φ")],
        "optimizer states": [(master + moments, 1, "Φ")],
    }
    on_host = {}
    if options.offload != "none":
        streamed = options.offload_parameters
        on_device = {"parameters": [] if streamed else [trained, *frozen], "gradients": [], "optimizer states": []}
        if streamed and options.is_adapter:
            on_device["parameters"] = [trained]
        width = parameter + HOST_MASTER_BYTES[options.precision] + GRADIENT_BYTES
        held = [(width if options.offload_path else width + moments, 1, "Φ")]
        on_host["in host memory"] = cell(*held, *(frozen if streamed else []))
    if options.offload_path is not None:
        on_host["on the drive"] = cell((moments, 1, "Φ"))
    everything = [term for terms in on_device.values() for term in terms]
    return {name: cell(*terms) for name, terms in on_device.items()} | {"sum": cell(*everything)} | on_host


def _note(options: Options) -> str:
    """Which formula it is."""
    parameter, gradient = PARAMETER_BYTES[options.precision], GRADIENT_BYTES
    states = MASTER_BYTES[options.precision] + NUM_MOMENTS[options.optim] * MOMENT_BYTES["fp32"]
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


def write(folder: Path, trainable: str, memory: str) -> str:
    """Write `report.md` from the metrics and the answers that lie in `folder`; its text."""
    text = "\n\n".join(
        [
            validation_table([one for one in read_metrics(folder / METRICS) if "validation_loss" in one]),
            "![training and validation loss](loss.png)",
            trainable,
            memory,
            f"Greedy answers to held-out questions, repetition penalty {answers.REPETITION_PENALTY}. {answers.NOTICE}",
            answers.shown(answers.read(folder)),
        ]
    )
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    return text


def plot_losses(folder: Path) -> None:
    """Draw `loss.png` from the metrics file: mean loss a label token (nats) against the optimizer step."""
    from matplotlib.figure import Figure  # slow to load; without pyplot it needs no display

    records = read_metrics(folder / METRICS)
    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for key, label, style in (("loss", "train", "-"), ("validation_loss", "validation", "o-")):
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss a label token (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=120)
