"""Do the examples of transformers and TRL train as the scripts for DDP that they were before the marked changes?"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from paths import ROOT
from programs import Program

from zerolite.examples import hf_trainer, trl_sft  # with all that they import: see the zygote

EXAMPLES = ROOT / "zerolite" / "examples"
MARK = re.compile(r"\s*# zerolite(?:: was (.*))?$")


def original(name: str) -> tuple[str, int]:
    """The script before zerolite's changes, and how many lines they are."""
    lines, changed = [], 0
    for line in (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines():
        mark = MARK.search(line)
        changed += mark is not None
        if mark is None:
            lines.append(line)
        elif mark[1] is not None:
            lines.append(line[: len(line) - len(line.lstrip())] + mark[1])
    return "\n".join(lines) + "\n", changed


def losses(script: Path, folder: Path, *options: str) -> list[float]:
    """Losses and those of evaluations that a run on two ranks logs."""
    arguments = [
        "--output_dir", str(folder), "--use_cpu", "--max_steps", "4", "--logging_steps", "1", "--eval_strategy",
        "steps", "--eval_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
        "--max_grad_norm", "0.3", "--learning_rate", "0.01", "--report_to", "none", "--save_steps", "4", *options,
    ]  # fmt: skip
    program = Program(script, arguments, 2, {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
    _, err = program.communicate()
    assert program.returncode == 0, err
    log = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [row[name] for row in log for name in ("loss", "eval_loss") if name in row]


@pytest.mark.parametrize(
    ("example", "options", "weights"),
    [
        (hf_trainer, [], "model.safetensors"),
        (trl_sft, ["--use_peft", "--lora_r", "4", "--bf16", "False"], "adapter_model.safetensors"),
    ],
)
def test_an_example_trains_as_the_script_that_it_was(tmp_path, example, options, weights):
    name = example.__name__.rpartition(".")[2]
    before, changed = original(name)
    assert "integrations" not in before and "Zero" not in before
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"\[{name}\.py\].*\| {changed} \|", readme), f"{name} changes {changed} lines"
    script = tmp_path / f"{name}_before.py"
    script.write_text(before, encoding="utf-8")
    expected = losses(script, tmp_path / "before", *options)
    actual = losses(EXAMPLES / f"{name}.py", tmp_path / "after", *options)
    assert actual == pytest.approx(expected, rel=1e-4) and len(actual) == 6
    assert expected[0] > expected[-1], "it learns"
    assert (tmp_path / "after" / weights).exists()
