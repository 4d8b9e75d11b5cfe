"""What each way to fine-tune costs and learns: full, LoRA and each prompt method on the main job.

Runs `train_medqa.py` on a pretrained base with each method, one after the other: trainable parameters, bytes of model
states on a rank, speed, and validation loss before and after, each at its own usual learning rate.

    python benchmarks/adapters/finetune_methods.py --base outputs/medqa/model             # after `make train-tiny`
    python benchmarks/adapters/finetune_methods.py --base folder -- --train_file a.jsonl --val_size .1  # for every run
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all benchmarks share

import harness
import main_job
from harness import DEVICE, MIB

METHODS = {
    "full": [],
    "lora": [],
    "lora, all linear": ["--finetuning_type", "lora", "--lora_target", "all-linear"],
    "prompt": [],
    "prefix": [],
    "p-tuning": [],
    "p-tuning-v2": [],
}


def measure(name: str, base: str, ranks: int, extra: list[str]) -> dict:
    method = METHODS[name] or ["--finetuning_type", name]
    job = main_job.run(name, ranks, ["--model_name_or_path", base, *method, *extra])
    print(f"{name:16} validation loss {job.first_loss:.4f} -> {job.last_loss:.4f}", flush=True)
    return {
        "name": name,
        "validation_losses": job.validation_losses,
        "first": job.first_loss,
        "last": job.last_loss,
        "tokens_per_second": job.tokens_per_second,
        "memory": job.memory,
    }


def markdown(report: dict) -> str:
    states = ("parameters", "gradients", "optimizer states")
    peak = next(column for column in report["rows"][0]["memory"] if column.startswith("peak"))
    table = harness.markdown_table(
        ["method", *(f"{state}, MiB" for state in states), f"{peak}, MiB", "tokens/s", "loss before", "after"],
        [
            [
                row["name"],
                *(f"{row['memory'][state] / MIB:.2f}" for state in states),
                f"{row['memory'][peak] / MIB:.0f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['first']:.4f}",
                f"{row['last']:.4f}",
            ]
            for row in report["rows"]
        ],
    )
    return f"""# Ways to fine-tune on the main job: {report["ranks"]} ranks, {DEVICE.type}

{harness.facts_markdown(report["facts"])}

`train_medqa.py`, {report["steps"]} steps of each method at its own usual learning rate; model states of rank 0,
counted; validation loss in nats a label token, before any step (an untrained adapter) and after the last. Speeds are
those of one run after the other, on a machine that others use too.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the pretrained model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("extra", nargs="*", help="options of train_medqa.py, after --")
    options = parser.parse_args()
    if "--train_file" in options.extra and not {"--val_size", "--validation_file"} & {*options.extra}:
        parser.error("--train_file: what methods learn is measured on rows of --val_size or --validation_file")
    facts = harness.machine_facts(("torch", "transformers"))
    rows = [measure(name, options.base, options.ranks, options.extra) for name in options.methods]
    steps = max(rows[0]["validation_losses"])
    report = {"facts": facts, "ranks": options.ranks, "steps": steps, "rows": rows}
    harness.write_report(options.output, f"finetune_methods_{DEVICE.type}", report, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
