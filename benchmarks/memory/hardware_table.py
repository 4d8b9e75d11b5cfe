"""How many GiB does each card need? Methods times model sizes, from `zerolite.plan`; some of it measured.

One row of 2,048 tokens a card, blocks recomputed, logits never whole, AdamW; 0.75 GiB of each card are assumed for the
process. `--measure N` trains SmolLM2-135M for two steps in each row of at most N cards, on this machine's device, and
marks what was measured (not in fp32, which takes long on a CPU). Without it, marks of the table that is there stay.

    python benchmarks/memory/hardware_table.py --measure 2
    python benchmarks/memory/hardware_table.py --models llama-3-8b qwen-7b --output folder
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all benchmarks share

import harness
import memory
from configurations import LORA
from harness import DEVICE

from zerolite.memory.presets import PRESETS

GIB = 2**30
MEASURED = "smollm2-135m"


class Method(NamedTuple):
    name: str
    mode: str  # of configurations.py
    cards: tuple[int, ...]
    precision: str = "bf16"


METHODS = (
    Method("full, fp32", "zerolite0", (1,), "fp32"),
    Method("full", "zerolite0", (1,)),
    Method("stage 1", "zerolite1", (2, 8)),
    Method("stage 2", "zerolite2", (2, 8)),
    Method("stage 3", "zerolite3", (2, 8)),
    Method("stage 2, optimizer offloaded", "zerolite2-optimizer", (1, 2, 8)),
    Method("stage 3, parameters offloaded", "zerolite3-parameters", (1, 2, 8)),
    Method("LoRA", "zerolite0-lora", (1,)),
    Method("LoRA, stage 3", "zerolite3-lora", (2, 8)),
    Method("LoRA, stage 3, parameters offloaded", "zerolite3-parameters-lora", (1, 2, 8)),
)


def work_of(model: str, precision: str) -> memory.Work:
    return memory.Work(model, precision, micro_batch=1, sequence=2048, checkpointing=True, chunked_loss=True)


def planned(method: Method, cards: int, model: str) -> dict[str, int]:
    """Bytes of one card, and of the host that holds all of them."""
    plan = memory.plan_of(method.mode, cards, work_of(model, method.precision), "cuda")
    return {"card_bytes": plan.peak_bytes, "host_bytes": plan.host_bytes, "states_bytes": plan.states_bytes}


def measured(method: Method, cards: int, timeout: float) -> dict:
    """Peak bytes of a rank on this device, beside what the plan says for this device; or why it did not run."""
    row = memory.run(method.mode, cards, work_of(MEASURED, method.precision), 0, {"timeout": timeout})
    if "reason" in row:
        return {"reason": row["reason"]}
    return {
        "model": MEASURED,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": DEVICE.type,
        "peak_bytes": sum(row["peak"].values()),
        "plan_bytes": sum(row["plan"]["peak"].values()),
        "allocated_bytes": row["allocated"],
    }


def kept(method: Method, cards: int, earlier: dict) -> dict | None:
    """What an earlier table has measured in this row, beside the plan of today."""
    for row in earlier["rows"]:
        if (
            (row["method"], row["cards"]) == (method.name, cards)
            and row["measured"]
            and "reason" not in row["measured"]
        ):
            plan = memory.plan_of(method.mode, cards, work_of(MEASURED, method.precision), row["measured"]["device"])
            return row["measured"] | {"plan_bytes": max(peak.total_bytes for peak in plan.peaks.values())}
    return None


def collect(models: list[str], most_measured: int, timeout: float, earlier: dict) -> dict:
    """What the JSON file holds."""
    facts, rows = harness.machine_facts(("torch", "transformers")), []
    for method in METHODS:
        for cards in method.cards:
            row = {"method": method.name, "mode": method.mode, "precision": method.precision, "cards": cards}
            row["models"] = {model: planned(method, cards, model) for model in models}
            is_measured = cards <= most_measured and method.precision == "bf16"  # fp32 would take minutes on a CPU
            row["measured"] = measured(method, cards, timeout) if is_measured else kept(method, cards, earlier)
            rows.append(row)
            print(
                f"{method.name}, {cards}: {[round(m['card_bytes'] / GIB, 1) for m in row['models'].values()]}",
                flush=True,
            )
    return {"facts": facts, "work": dataclasses.asdict(work_of("", "bf16")), "models": models, "rows": rows}


def gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f}"


def mark(row: dict) -> str:
    """How far the plan is off what was measured in this row."""
    found = row["measured"]
    if found is None:
        return "–"
    if "reason" in found:
        return f"did not run: {found['reason']}".replace("|", "/")
    return f"✓ {gib(found['peak_bytes'])}, plan {found['plan_bytes'] / found['peak_bytes'] - 1:+.2%}"


def cell(of_model: dict, is_offloaded: bool) -> str:
    return gib(of_model["card_bytes"]) + (f" + {of_model['host_bytes'] / GIB:.0f}" if is_offloaded else "")


def _dates_of(report: dict) -> str:
    found = {f"{m['device']}, {m['date']}" for row in report["rows"] if (m := row["measured"]) and "date" in m}
    return "; ".join(sorted(found)) or "nowhere yet"


def markdown(report: dict) -> str:
    models, work = report["models"], report["work"]
    rows = [
        [
            row["method"],
            row["cards"],
            *(cell(row["models"][model], "offloaded" in row["method"]) for model in models),
            mark(row),
        ]
        for row in report["rows"]
    ]
    table = harness.markdown_table(["method", "cards", *models, f"measured: {MEASURED}"], rows)
    return f"""# GiB on each card

{harness.facts_markdown(report["facts"])}

`zerolite.plan` for a GPU: {work["micro_batch"]} x {work["sequence"]} tokens a card, blocks recomputed, logits never
whole, AdamW. bf16 with an fp32 master where nothing else is said, reduced in bf16; LoRA of rank
{LORA["r"]} on Q, K and V over a frozen base. 0.75 GiB of each card are a process's (assumed). Behind the +:
GiB of the host that holds all of these cards, with its processes.

{table}

✓: SmolLM2-135M was trained so for two steps ({_dates_of(report)}), and this was the peak of a rank's tensors; the plan
for that device was so far off. A GPU's plan differs from a CPU's by the process's 0.75 GiB and by the step's scratch
memory. No other model was measured.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [MEASURED, "llama-7b", "llama-13b", "llama-70b"]
    parser.add_argument("--models", nargs="+", choices=PRESETS, default=models)
    parser.add_argument("--measure", type=int, default=0, metavar="N", help="train in rows of at most N cards, in bf16")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one row may take")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    file = options.output / "hardware_table.json"
    earlier = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    report = collect(options.models, options.measure, options.timeout, earlier)
    harness.write_report(options.output, "hardware_table", report, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
