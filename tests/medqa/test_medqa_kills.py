"""Does train_medqa.py resume to the bits of an undisturbed run when torchrun, a rank or a worker is killed?"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

import killed_medqa
import pytest
from deaths import SAVING, TRAINING, Board, Death
from kills import Undisturbed, campaign, is_running
from medqa_runs import tiny_llama, to_flags
from paths import ROOT
from programs import Program
from zerolite_kernels import cpu

from zerolite.medqa import resume
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.progress import METRICS, read_metrics

SCRIPT = Path(killed_medqa.__file__)
NUM_STEPS, SAVE_STEPS = 8, 2
SHAPES = [
    {"stage": 2},
    {"stage": 3, "offload": "cpu", "offload_workers": 1, "precision": "bf16"},
    {"stage": 2, "finetuning_type": "lora", "lora_dropout": 0.2},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """Options of a run that takes milliseconds a step."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama().save_pretrained(folder / "model")
    rows = [
        json.dumps({"instruction": f"What is fever number {i}?", "output": "Heat. " * (i % 3 + 1)}) for i in range(8)
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    files = {"train_file": folder / "rows.jsonl", "validation_file": folder / "rows.jsonl"}
    names = {"model_name_or_path": folder / "model", "tokenizer_name_or_path": CORPUS / "tokenizer"}
    steps = {"max_steps": NUM_STEPS, "save_steps": SAVE_STEPS, "logging_steps": 1, "eval_steps": 0}
    sizes = {"cutoff_len": 32, "per_device_train_batch_size": 1, "learning_rate": 1e-3}
    return {**names, **files, **steps, **sizes}


class Torchrun:
    """torchrun and what it started."""

    def __init__(self, folder: Path, flags: list[str], death: Death | None):
        self.board = Board(folder / "board")
        kills = json.dumps([str(folder), death and asdict(death)])
        path = os.pathsep.join([str(ROOT), str(SCRIPT.parent)])
        restarts = {"PET_MAX_RESTARTS": str(death.restarts)} if death and death.restarts else {}
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "KILLS": kills, **restarts}
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.program = Program(SCRIPT, flags, 2, environment, log)
        self.board.numbers[Board.AGENT] = self.program.pid
        self.board.numbers[Board.HAS_CHECKPOINT] = "--resume" in flags

    def codes(self) -> list[int | None]:
        return [self.program.poll()]

    def kill(self) -> None:
        for pid in (self.program.pid, *self.board.pids()):
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)

    def tail(self) -> str:
        return self.log.read_text()[-3000:]


@dataclass(frozen=True)
class Agents:
    """A target: train_medqa.py under torchrun on two ranks, which it starts again where there is a checkpoint."""

    inputs: dict
    shape: dict
    has_agent = True

    def draw(self, draw: random.Random, lived: Undisturbed) -> Death:
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        victims = draw.choice([("agent",), ("agent",), ("rank 0",), ("rank 1",), ("agent", "rank 0", "rank 1")])
        if "offload" in self.shape and draw.random() < 0.2:
            victims, number = ("worker",), signal.SIGKILL
        restarts = 2 if "agent" not in victims and draw.random() < 0.7 else 0
        return Death(victims, number, restarts=restarts, **lived.moment(draw))

    def start(self, folder: Path, death: Death | None, draw: random.Random) -> Torchrun:
        output = folder / "out"
        options = {**self.inputs, **self.shape, "output_dir": output}
        if resume.checkpoints(output):
            options["resume"] = output
        return Torchrun(folder, to_flags(options), death)

    def problems(self, death: Death, board: Board, folder: Path, codes: list[int | None]) -> list[str]:
        phase, step = board.numbers[Board.PHASE_THEN], board.numbers[Board.STEP_THEN]
        newest = max([0, *(int(path.name[11:]) for path in resume.checkpoints(folder / "out"))])
        if death.victims == ("agent",):
            expected = {-signal.SIGKILL} if death.number == signal.SIGKILL else {0, 1, -signal.SIGTERM}
            if phase in (TRAINING, SAVING) and 0 < step and newest < step:
                return [
                    f"ranks at step {step} did not save when torchrun was killed: the newest checkpoint is {newest}"
                ]
        elif "agent" in death.victims:
            expected = {-signal.SIGKILL} if death.number == signal.SIGKILL else {0, 1, -signal.SIGTERM}
        elif death.restarts and board.numbers[Board.HAS_CHECKPOINT]:
            expected = {0}
        else:
            expected = {0, 1}
        return [] if set(codes) <= expected | {None} else [f"torchrun ended with {codes}, expected {expected}"]

    def result(self, folder: Path) -> dict[str, object]:
        output = folder / "out"
        (weights,) = [path for path in output.glob("*/*.safetensors") if not path.parent.name.startswith("checkpoint")]
        records = read_metrics(output / METRICS)
        told: dict[tuple[int, bool], dict] = {}
        for record in records:  # a run that resumes also validates where it begins
            key = (record["step"], "validation_loss" in record)
            assert key not in told, f"metrics.jsonl tells twice of {key}"
            told[key] = record
        left = sorted(path.name for path in output.glob(".*"))
        assert not left, f"left {left}"
        numbers = {
            f"{name} at step {step}": told[step, name == "validation_loss"][name]
            for name in ("loss", "grad_norm", "learning_rate", "validation_loss")
            for step in ([0, NUM_STEPS] if name == "validation_loss" else range(1, NUM_STEPS + 1))
        }
        return {"weights": hashlib.sha256(weights.read_bytes()).hexdigest(), **numbers}


@pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("shape", "kills"), [(1, 4), *(pytest.param(shape, 84, marks=pytest.mark.slow) for shape in range(len(SHAPES)))]
)
def test_killed_agents_ranks_and_workers_resume_to_the_bits_of_a_run_that_was_not_killed(
    inputs, tmp_path, shape, kills
):
    tally = campaign(Agents(inputs, SHAPES[shape]), kills, shape, tmp_path)
    print(f"{SHAPES[shape]}: {tally}")
    assert not tally.failures, "\n\n".join(tally.failures)
