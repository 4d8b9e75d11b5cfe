"""What a run leaves to read: `report.md` with perplexity, memory and answers, and `loss.png`."""

import math
from pathlib import Path

import matplotlib
from torch import nn

import zerolite
from zerolite.medqa.answers import Answer
from zerolite.medqa.arguments import Options
from zerolite.medqa.processes import Processes
from zerolite.medqa.progress import METRICS, read_metrics

matplotlib.use("Agg")  # no display on a training machine
import matplotlib.pyplot as plt  # noqa: E402

# Bytes a parameter of optimizer states in fp32; 16-bit parameters add an fp32 master copy.
STATE_BYTES = {"adamw": 8, "adam": 8, "lamb": 8, "lion": 4}
PARAMETER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER_BYTES = {"fp32": 0, "bf16": 4, "fp16": 4}
GRADIENT_BYTES = 4  # reduced and kept in fp32, at every precision


def memory_table(model: nn.Module, optimizer, options: Options, processes: Processes) -> str:
    """Bytes of model states on each rank, counted, beside the formula. Every rank must call it, between a backward
    pass and zero_grad, since that is when the gradients exist."""
    usage = zerolite.measure(model, optimizer)
    ranks = processes.gather(
        usage.parameters_bytes,
        usage.gradients_bytes,
        usage.optimizer_bytes,
        usage.padding_bytes,
        processes.peak_memory_bytes(),
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    formula, of_formula = _formula(options, num_parameters, processes.world_size)
    peak = "peak on the device" if processes.device.type == "cuda" else "peak resident"
    lines = [
        f"Model states at stage {options.stage}, {options.precision}, {options.optim}, N = {processes.world_size}, "
        f"Φ = {num_parameters:,} parameters. All in bytes; padding is part of the counted numbers.",
        "",
        f"| rank | parameters | gradients | optimizer states | sum | of it padding | {peak} |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for rank, row in enumerate(ranks):
        parameters, gradients, states, padding, peak_bytes = map(int, row)
        cells = (parameters, gradients, states, parameters + gradients + states, padding, peak_bytes)
        lines.append(f"| {rank} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    lines.append("| formula | " + " | ".join(f"{text} = {value:,.0f}" for text, value in formula) + " | - | - |")
    return "\n".join([*lines, "", of_formula])


def _formula(options: Options, num_parameters: int, world_size: int) -> tuple[list[tuple[str, float]], str]:
    """(text, bytes) of parameters, gradients, states and their sum a rank, and a line that says which formula it is."""
    parameter, gradient = PARAMETER_BYTES[options.precision], GRADIENT_BYTES
    states = MASTER_BYTES[options.precision] + STATE_BYTES[options.optim]
    terms = []
    for bytes_each, sharded_from in ((parameter, 3), (gradient, 2), (states, 1)):
        is_sharded = options.stage >= sharded_from
        text = f"{bytes_each}Φ/N" if is_sharded else f"{bytes_each}Φ"
        terms.append((text, bytes_each * num_parameters / (world_size if is_sharded else 1)))
    total = parameter + gradient + states
    note = f"Unsharded, {options.precision} with {options.optim} is {parameter} + {gradient} + {states} = {total}Φ"
    if options.precision == "fp32":
        note += ": there is no master copy beside fp32 parameters."
    else:
        note += ": states hold an fp32 master copy, and gradients are summed and kept in fp32, 2Φ more than 16 bits."
    return [*terms, (" + ".join(text for text, _ in terms), sum(value for _, value in terms))], note


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def write(folder: Path, memory: str, answers: list[Answer]) -> str:
    """Write `report.md`; its text."""
    validations = [record for record in read_metrics(folder / METRICS) if "validation_loss" in record]
    lines = ["| | step | validation loss (nats a token) | perplexity |", "|---|---:|---:|---:|"]
    for name, record in (("before", validations[0]), ("after", validations[-1])):
        loss = math.nan if record["validation_loss"] is None else record["validation_loss"]
        lines.append(f"| {name} | {record['step']} | {loss:.4f} | {perplexity(loss):.2f} |")
    text = "\n\n".join(
        [
            "\n".join(lines),
            "![training and validation loss](loss.png)",
            memory,
            "Greedy answers to held-out questions. They are no medical advice.",
            answers_text(answers),
        ]
    )
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    return text


def plot_losses(folder: Path) -> None:
    """Draw `loss.png` from the metrics file: mean loss a label token (nats) against the optimizer step."""
    records = read_metrics(folder / METRICS)
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for key, label, style in (("loss", "train", "-"), ("validation_loss", "validation", "o-")):
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss a label token (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)


def answers_text(answers: list[Answer]) -> str:
    """Questions with the generated and the reference answer."""
    return "\n\n".join(
        f"**Question** {answer.question}\n\n**Generated** {answer.generated}\n\n**Reference** {answer.reference}"
        for answer in answers
    )
