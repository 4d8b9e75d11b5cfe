"""What the memory benchmark writes of its rows: a table, and a figure that is readable at the width of a page."""

from __future__ import annotations

import re
from pathlib import Path

import harness
from harness import MIB
from live_log import KINDS

COLORS = dict(zip(KINDS, ("#334155", "#0f766e", "#f59e0b", "#94a3b8"), strict=True))
HOST_COLOR, FAILED_COLOR = "#e2e8f0", "#b91c1c"
DASH = "–"


def reason_of(text: str) -> str:
    """The last line of a rank's log that says what was wrong, without paths."""
    text = re.sub(r"^\[rank\d+\]:\s*", "", text.strip(), flags=re.MULTILINE)
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*[\w.]*(Error|Exception)\b", line)]
    line = re.sub(r"(?<![\w.])/[\w./+-]*/", "", (lines or text.splitlines())[-1])
    return line if len(line) <= 240 else line[:237] + "..."


def total(row: dict) -> int:
    return sum(row["peak"].values())


def off_by(row: dict) -> float | None:
    """How far the plan's peak lies above what was measured, as a share of it; None without a plan."""
    return sum(row["plan"]["peak"].values()) / total(row) - 1 if row["plan"] and "peak" in row else None


def cells(row: dict) -> list[str]:
    formula = row["formula"]["device"] + row["formula"]["host"] * row["counts_host"]
    if "reason" in row:
        reason = f"did not run: {row['reason']}".replace("|", "/")
        return [row["mode"], reason, *[DASH] * 5, f"{formula / MIB:.1f}", *[DASH] * 5]
    name = row["mode"] + (" (host included)" if row["counts_host"] else "")
    peak, plan = row["peak"], row["plan"]
    kinds = [peak["states"] + peak["gradients"], peak["activations"], peak["in flight"]]
    return [
        name,
        *(f"{nbytes / MIB:.1f}" for nbytes in kinds),
        f"**{total(row) / MIB:.1f}**" + (f", {row['allocated'] / MIB:.1f} allocated" if row["allocated"] else ""),
        f"{sum(plan['peak'].values()) / MIB:.1f} ({off_by(row):+.2%})" if plan else DASH,
        f"{row['states'] / MIB:.1f}",
        f"{formula / MIB:.1f}",
        f"{plan['states'] / MIB:.1f}" if plan else DASH,
        f"{row['usage']['host_bytes'] / MIB:.1f}" if row["usage"] else DASH,
        f"{row['pss'] / MIB:.0f}",
        f"{row['step_to_ddp']:.2f}" if row["step_to_ddp"] else DASH,
        f"{row['by_rank'][0]['losses'][-1]:.3f}",
    ]


HEADER = [
    "configuration", "states", "activations", "in flight", "peak", "plan's peak", "states after backward", "formula",
    "plan's states", "offloaded", "process", "step / DDP", "loss",
]  # fmt: skip


def title_of(report: dict) -> str:
    settings = report["settings"]
    millions = report["parameters"] / 1e6
    return f"LLaMA {millions:.1f}M, {settings['precision']}, {settings['ranks']} ranks, {settings['device']}"


def markdown(report: dict) -> str:
    settings, rows = report["settings"], report["rows"]
    ran = [row for row in rows if "reason" not in row]
    gaps = [abs(off_by(row)) for row in ran if row["plan"]]
    noise = [row["noise"] for row in rows if row["noise"] is not None]
    spread = max((max(map(_total, r["by_rank"])) / min(map(_total, r["by_rank"])) - 1 for r in ran), default=0.0)
    text = f"""# Where a rank's memory goes: {title_of(report)}

{harness.facts_markdown(report["facts"])}
{_earlier(report)}
Micro-batch {settings["micro_batch"]} x {settings["sequence"]} tokens a rank, AdamW, fresh processes of one thread.
MiB of the rank that takes most; no two ranks of a configuration differ by more than {spread:.1%}.

{harness.markdown_table(HEADER, [cells(row) for row in rows])}

- States, activations, in flight: what lives at the moment of the second step's peak. Every storage is counted from the
  operation of torch that made it until it is freed (`benchmarks/memory/live_log.py`), for every library alike.
  States: what lives from step to step, and gradients from backward to the step. In flight: gathered for a while, in a
  collective, or made and freed by the step. Activations: all else, with the gradients of activations.
- Plan: `zerolite.plan` with the same arguments. {_said_of(gaps)}
- States after backward: with all gradients, beside the formula (16 bytes a trainable parameter, 2 or 4 a frozen one,
  divided as the stage divides) and beside the plan's states. DDP keeps its buckets, 4 bytes a parameter, from step to
  step beside the formula; its autocast keeps bf16 copies of weights among the activations.
- Offloaded: zerolite's arena in host memory, which is none of the columns before. On the CPU what a peer offloads lies
  in the memory that is counted: such rows and their formula include it.
- Process: PSS of a rank and its workers above what it was before the model, between backward and step.
- Step: barrier to barrier on rank 0, the median of {settings["steps"]}, over the mean of the DDP runs before and after
  the group of {settings["group"]}. Those two differ by {_noise_text(noise)}.{_load_text(report["facts"])}
- bf16: an fp32 master beside bf16 parameters (zerolite, DeepSpeed), autocast over fp32 (DDP), fp32 shards gathered in
  bf16 (FSDP2), nothing beside bf16 (torchao), a frozen base in bf16 under an fp32 adapter (PEFT). torchao's 8-bit step
  is not compiled here, since compiled code cannot be counted: its users have another time and other bytes in flight.
"""
    if report["over_ranks"]:
        text += "\n## Over world size\nPeak MiB a rank; in brackets the plan's.\n\n" + _scale_table(report) + "\n"
    return text


def _earlier(report: dict) -> str:
    """The runs before this one, whose rows it kept."""
    return "".join(
        f"\nSome rows are of {facts['date']} · commit {facts['commit']} · `{facts['command']}`\n"
        for facts in report["earlier_facts"]
    )


def _total(rank: dict) -> int:
    return sum(rank["peak"].values())


def _said_of(gaps: list[float]) -> str:
    if not gaps:
        return "No row here has one."
    return f"Of {len(gaps)} rows the farthest is {max(gaps):.2%} off what was measured."


def _noise_text(noise: list[float]) -> str:
    return f"up to {max(noise):.0%}" if noise else "an unknown share (DDP did not run twice)"


def _load_text(facts: dict) -> str:
    if facts["load_average"] <= facts["cores"]:
        return " Nothing smaller than that is a result."
    return (
        f" The load average was {facts['load_average']} on {facts['cores']} cores, so ratios show an order of "
        "magnitude.\n  Bytes do not depend on it."
    )


def _scale_table(report: dict) -> str:
    ranks = sorted({row["ranks"] for row in report["over_ranks"]})
    modes = list(dict.fromkeys(row["mode"] for row in report["over_ranks"]))
    found = {(row["mode"], row["ranks"]): row for row in report["over_ranks"]}

    def cell(row: dict | None) -> str:
        if row is None or "reason" in row:
            return DASH if row is None else f"did not run: {row['reason']}".replace("|", "/")
        plan = f" ({sum(row['plan']['peak'].values()) / MIB:.1f})" if row["plan"] else ""
        return f"{total(row) / MIB:.1f}{plan}"

    lines = [[mode, *(cell(found.get((mode, number))) for number in ranks)] for mode in modes]
    return harness.markdown_table(["configuration", *(f"{number} ranks" for number in ranks)], lines)


# --- the figure -----------------------------------------------------------------------------------------------------


def draw(path: Path, report: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, has_scale = report["rows"], bool(report["over_ranks"])
    heights = [0.26 * len(rows) + 1.2, 3.6] if has_scale else [0.26 * len(rows) + 1.2]
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(9, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    _draw_bars(axes[0][0], rows)
    if has_scale:
        _draw_scale(axes[1][0], report)
    figure.suptitle(f"MiB on a rank at the peak of a step: {title_of(report)}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_bars(axis, rows: list[dict]) -> None:
    places = range(len(rows))
    left = [0.0] * len(rows)
    for kind in KINDS:
        widths = [row["peak"][kind] / MIB if "peak" in row else 0.0 for row in rows]
        axis.barh(places, widths, left=left, color=COLORS[kind], label=kind, height=0.72)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    arenas = [row["usage"]["host_bytes"] / MIB if row.get("usage") else 0.0 for row in rows]
    axis.barh(
        places, arenas, left=left, color=HOST_COLOR, edgecolor="#64748b", hatch="////", linewidth=0, height=0.72,
        label="offloaded to the host (zerolite's arena)",
    )  # fmt: skip
    planned = [(place, row["plan"]) for place, row in zip(places, rows, strict=True) if row["plan"] and "peak" in row]
    axis.plot(
        [sum(plan["peak"].values()) / MIB for _, plan in planned], [place for place, _ in planned], "|",
        color="#dc2626", markersize=12, markeredgewidth=2, label="zerolite.plan: the device's peak",
    )  # fmt: skip
    formulas = [(row["formula"]["device"] + row["formula"]["host"] * row["counts_host"]) / MIB for row in rows]
    axis.plot(
        formulas, places, "D", color="white", markeredgecolor="black", markersize=4.5, label="formula: states alone"
    )
    for place, row, end, arena in zip(places, rows, left, arenas, strict=True):
        if "reason" in row:
            axis.annotate(f"  did not run: {row['reason'][:60]}", (formulas[place], place), va="center", fontsize=8,
                          color=FAILED_COLOR)  # fmt: skip
        else:
            far = max(end + arena, formulas[place])
            axis.annotate(f"{end:.0f}", (far, place), (7, 0), textcoords="offset points", va="center", fontsize=8)
    labels = [row["mode"] + (" (with host)" if row["counts_host"] else "") for row in rows]
    axis.set_yticks(places, labels, fontsize=8.5)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * max([1.0, *formulas, *(end + arena for end, arena in zip(left, arenas, strict=True))]))
    axis.set_xlabel("MiB; the number is what was measured on the device")
    axis.margins(y=0.01)
    axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_scale(axis, report: dict) -> None:
    measured = [row for row in report["over_ranks"] if "reason" not in row]
    modes = list(dict.fromkeys(row["mode"] for row in measured))
    for mode, color in zip(modes, ("#64748b", "#0284c7", "#0f766e", "#c2410c", "#7c3aed"), strict=False):
        points = sorted((row["ranks"], total(row) / MIB) for row in measured if row["mode"] == mode)
        axis.plot(*zip(*points, strict=True), "o", color=color, label=f"{mode}, measured")
        line = [each for each in report["planned_over_ranks"] if each["mode"] == mode]
        if line:
            sizes = [sum(each["plan"]["peak"].values()) / MIB for each in line]
            axis.plot(
                [each["ranks"] for each in line], sizes, "-", color=color, linewidth=1.2, label=f"{mode}, planned"
            )
    axis.set_xscale("log", base=2)
    ticks = sorted({row["ranks"] for row in measured} | {each["ranks"] for each in report["planned_over_ranks"]})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set(xlabel="ranks", ylabel="MiB a rank", ylim=(0, None))
    axis.legend(fontsize=8, frameon=False, ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
