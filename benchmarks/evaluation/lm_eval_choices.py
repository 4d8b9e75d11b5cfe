"""Does `zerolite evaluate` choose as lm-eval does? The same model and questions through both, by letter and by text.

    pip install lm-eval==0.4.13
    python benchmarks/evaluation/lm_eval_choices.py outputs/medqa/model --choices mcq.jsonl --name medqa

MODEL is a Hugging Face folder with a chat template. lm-eval gets a task (YAML, in a temporary folder) whose texts are
those of `zerolite.medqa.evaluation.choices`, and its own chat template, tokenizer calls, batches and accuracies. It
scores the line feed in front of a continuation with it, which shifts all options of a question alike: what is compared
are differences from a question's mean, the choices and the accuracies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import harness

from zerolite.medqa.evaluation import choices

WAYS, ACCURACIES = choices.WAYS, ("acc", "acc_norm")
TASK = """
task: zerolite_{way}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def of_zerolite(model: Path, questions: Path, folder: Path, num: int | None) -> list[dict]:
    """The rows of `questions` in evaluation.json; the safety questions' answers are one token long."""
    command = [sys.executable, "-m", "zerolite.medqa.evaluate", str(model), "--choices", str(questions)]
    command += ["--output_dir", str(folder / "ours"), "--precision", "fp32", "--max_new_tokens", "1"]
    command += ["--max_samples", str(num)] if num else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "ours" / "evaluation.json").read_text(encoding="utf-8"))["questions"]


def of_lm_eval(model: Path, asked: list[choices.Question], folder: Path, batch: int) -> dict[str, list]:
    """Way: of each question its log-likelihoods and accuracies."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    for way in WAYS:
        rows = [{"query": q.asked(way), "choices": q.continuations(way), "gold": q.gold} for q in asked]
        data = folder / f"{way}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{way}.yaml").write_text(TASK.format(way=way, data=data))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=[f"zerolite_{way}" for way in WAYS],
        task_manager=TaskManager(include_path=str(folder)),
        batch_size=batch,
        device=harness.DEVICE.type,
        apply_chat_template=True,
        log_samples=True,
        bootstrap_iters=0,
    )
    found = {}
    for way in WAYS:
        samples = sorted(results["samples"][f"zerolite_{way}"], key=lambda one: one["doc_id"])
        found[way] = [
            {"log_likelihoods": [float(one[0]) for one in sample["filtered_resps"]]}
            | {name: sample[name] for name in ACCURACIES}
            for sample in samples
        ]
    return found


def compared(asked: list[choices.Question], ours: list[dict], theirs: dict[str, list]) -> list[dict]:
    """A row for each kind, language and way."""
    rows = []
    for (kind, language), numbers in choices.groups(asked).items():
        for way in WAYS:
            pairs = [(ours[number]["model"][way], theirs[way][number]) for number in numbers]
            likelihoods = [[np.asarray(one["log_likelihoods"]) for one in pair] for pair in pairs]
            apart = [(a - a.mean()) - (b - b.mean()) for a, b in likelihoods]
            row = {"kind": kind, "language": language, "scored": way, "questions": len(numbers)}
            for name in ACCURACIES:
                row[f"{name}_zerolite"] = sum(a["right"][name] for a, _ in pairs) / len(pairs)
                row[f"{name}_lm_eval"] = sum(b[name] for _, b in pairs) / len(pairs)
            row["other_choices"] = sum(int(np.argmax(a) != np.argmax(b)) for a, b in likelihoods)
            row["largest_difference"] = max(float(np.abs(one).max()) for one in apart)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--choices", type=Path, required=True)
    parser.add_argument("--max_samples", type=int, help="the first so many questions (default: all)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--name", default="cpu", help="of the result: lm_eval_choices_NAME")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    given = parser.parse_args()
    facts = harness.machine_facts(("torch", "transformers", "lm_eval"))
    asked, _ = choices.read(given.choices, False, given.max_samples)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ours = of_zerolite(given.model, given.choices, folder, given.max_samples)
        theirs = of_lm_eval(given.model, asked, folder, given.batch_size)
    rows = compared(asked, ours, theirs)
    header = ["kind", "language", "scored", "questions", "acc, zerolite / lm-eval", "acc_norm, zerolite / lm-eval"]
    table = [
        [row["kind"], row["language"], row["scored"], row["questions"]]
        + [f"{row[f'{name}_zerolite']:.4f} / {row[f'{name}_lm_eval']:.4f}" for name in ACCURACIES]
        + [row["other_choices"], f"{row['largest_difference']:.1e}"]
        for row in rows
    ]
    text = (
        f"# Multiple choice: zerolite and lm-eval\n\n{harness.facts_markdown(facts)}\n\n"
        f"{given.model.name}, fp32, {len(asked)} questions of {given.choices.name}. The last column is in nats, after "
        "each question's mean is taken off.\n\n"
        + harness.markdown_table([*header, "other choices", "log-likelihoods apart, at most"], table)
        + "\n"
    )
    report = {"facts": facts, "rows": rows}
    print(harness.write_report(given.output, f"lm_eval_choices_{given.name}", report, text))
    print(text)


if __name__ == "__main__":
    main()
