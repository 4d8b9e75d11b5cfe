"""Do smaller optimizer states learn as much? The main job, offloaded, with moments in fp32, bf16 and int8.

Runs `train_medqa.py` without offload and with each state format, one after the other, and compares the validation loss.

    python benchmarks/offload/offload_states.py                        # the defaults of train_medqa.py on two ranks
    python benchmarks/offload/offload_states.py -- --max_steps 200     # after --: for every run
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all benchmarks share

import harness
import main_job
from harness import DEVICE, MIB

RUNS = {
    "no offload": [],
    **{states: ["--offload", "cpu", "--offload_states", states] for states in ("fp32", "bf16", "int8")},
}


def measure(name: str, ranks: int, extra: list[str]) -> dict:
    """One run of the main job: its validation losses by step, its median speed, and rank 0's host bytes."""
    job = main_job.run(name, ranks, [*RUNS[name], *extra])
    print(f"{name:12} validation loss {job.last_loss:.4f} after {max(job.validation_losses)} steps", flush=True)
    return {
        "name": name,
        "validation_losses": job.validation_losses,
        "final": job.last_loss,
        "tokens_per_second": job.tokens_per_second,
        "host_bytes": job.memory.get("in host memory", 0),
    }


def markdown(report: dict) -> str:
    rows, steps = report["rows"], sorted(report["rows"][0]["validation_losses"])
    reference = next(row["final"] for row in rows if row["name"] == "fp32")
    table = harness.markdown_table(
        ["moments", *(f"step {step}" for step in steps), "last / fp32 - 1", "host MiB a rank", "tokens/s, median"],
        [
            [
                row["name"],
                *(f"{row['validation_losses'][step]:.4f}" for step in steps),
                f"{row['final'] / reference - 1:+.2%}",
                f"{row['host_bytes'] / MIB:.1f}",
                f"{row['tokens_per_second']:.0f}",
            ]
            for row in rows
        ],
    )
    return f"""# Validation loss of the main job by format of the moments: {report["ranks"]} ranks, {DEVICE.type}

{harness.facts_markdown(report["facts"])}

`train_medqa.py` with its defaults but for the options above; loss in nats a label token. Speeds are those of one run
after the other, on a machine that others use too: no benchmark.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("extra", nargs="*", help="options of train_medqa.py, after --")
    options = parser.parse_args()
    facts = harness.machine_facts(("torch", "transformers"))
    rows = [measure(name, options.ranks, options.extra) for name in RUNS]
    report = {"facts": facts, "ranks": options.ranks, "extra": options.extra, "rows": rows}
    harness.write_report(options.output, f"offload_states_{DEVICE.type}", report, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
