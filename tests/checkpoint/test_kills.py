"""Do killed ranks and workers, in training, saving or resuming, resume to the bits of an undisturbed run?"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deaths import DONE, JOINING, RESUMING, SAVING, STARTING, TRAINING, Board, Death
from kills import Tally, Undisturbed, campaign
from saved import Odd, full, make, state, train
from zerolite_kernels import cpu
from zygote import zygote

import zerolite
from zerolite.runtime import atomic_dir

NUM_STEPS, SAVE_STEPS = 9, 2
ENDED_BY_AN_ERROR = 3
GROUP_TIMEOUT = timedelta(seconds=30)


class Noisy(Odd):
    """With dropout: a run goes on with the random numbers it would have drawn."""

    def forward(self, x):
        return super().forward(torch.nn.functional.dropout(x, 0.1, self.training))


@dataclass(frozen=True)
class Shape:
    """How a run is sharded and saved."""

    stage: int
    offload: zerolite.Offload | None = None
    dtype: torch.dtype = torch.float32
    rule: str = "AdamW"
    replaces: bool = False  # one folder, again and again, and by two renames
    moves: bool = False  # a run that resumes draws its stage, and whether it offloads: no number depends on them


HOST = zerolite.Offload(workers=2, threads=1)
SHAPES = [
    Shape(3, HOST),
    Shape(0),
    Shape(2, moves=True),
    Shape(1, zerolite.Offload(workers=1, threads=1, states="int8"), torch.bfloat16),
    Shape(2, HOST, torch.float16, "Lion", replaces=True),
    Shape(3, dtype=torch.float64, rule="Lamb", replaces=True),
]


def live(connection: int, folder: Path, rank: int, death: Death | None, shape: Shape) -> None:
    """The life of a rank, from a fork of the zygote to its end. Does not return."""
    code = 0
    try:
        board = Board(folder / "board")
        board.join(rank, death)
        store = dist.FileStore(str(folder / "rendezvous"), 2)
        dist.init_process_group("gloo", timeout=GROUP_TIMEOUT, store=store, rank=rank, world_size=2)
        go_on(folder, rank, board, shape)
    except BaseException:
        traceback.print_exc()
        code = ENDED_BY_AN_ERROR
    os._exit(code)


def go_on(folder: Path, rank: int, board: Board, shape: Shape) -> None:
    """Train from where the newest checkpoint is, and leave digests of all bits."""
    board.set_phase(rank, STARTING)
    if shape.replaces:
        atomic_dir._exchange = lambda first, second: False
    model, optimizer = make(shape.stage, shape.dtype, shape.rule, cls=Noisy, offload=shape.offload)
    torch.manual_seed(rank)
    step, norms = 0, []
    found = sorted((folder / "saved").glob("step*"), key=lambda path: int(path.name[5:] or 0))
    if found or shape.replaces and list((folder / "saved").glob(".step.tmp-old-*")):
        board.set_phase(rank, RESUMING)
        newest = folder / "saved" / "step" if shape.replaces else found[-1]
        extra = zerolite.load(model, newest, optimizer)
        step, norms = extra["step"], extra["norms"]
        torch.set_rng_state(extra["random"])
    begins_at_the_end = step == NUM_STEPS  # where a save may have died with something beside it
    while step < NUM_STEPS or begins_at_the_end:
        board.set_phase(rank, TRAINING)
        if not begins_at_the_end:
            train(model, optimizer, range(step, step + 1))
            step += 1
            norms.append(optimizer.grad_norm)
            board.set_step(rank, step)
        if step % SAVE_STEPS == 0 or step == NUM_STEPS:
            board.set_phase(rank, SAVING)
            name = "step" if shape.replaces else f"step-{step}"
            extra = {"step": step, "norms": norms, "random": torch.get_rng_state()}
            zerolite.save(model, folder / "saved" / name, optimizer, extra)
        begins_at_the_end = False
    bits = {**state(model, optimizer), **full(model)}
    digests = {
        f"{name} of rank {rank}": hashlib.sha256(as_bytes(value)).hexdigest()
        for name, value in bits.items()
        if not name.endswith(" full")  # a buffer that is there at stages 0 to 2
    }
    (folder / f"result-{rank}").write_text(json.dumps({**digests, "norms": norms}))
    board.set_phase(rank, DONE)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


class Group:
    """Two ranks that run."""

    def __init__(self, folder: Path, arguments: tuple):
        self.log = folder / "log"
        (folder / "rendezvous").unlink(missing_ok=True)
        self.processes = []
        with self.log.open("w") as log:
            for rank in range(2):
                ours, theirs = socket.socketpair()
                with ours, theirs:
                    ends = {"out": log.fileno(), "err": log.fileno()}
                    self.processes.append(zygote().start(live, theirs, folder, rank, *arguments, **ends))

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def tail(self) -> str:
        return self.log.read_text()[-3000:]


@dataclass(frozen=True)
class Ranks:
    """A target: two ranks of one shape."""

    shape: Shape
    has_agent = False

    def draw(self, draw: random.Random, lived: Undisturbed) -> Death:
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        victims = draw.choice([("rank 0",), ("rank 1",), ("rank 0", "rank 1")])
        if self.shape.offload is not None and draw.random() < 0.4:
            victims, number = ("worker",), signal.SIGKILL  # it leaves SIGTERM to its rank
        return Death(victims, number, **lived.moment(draw))

    def start(self, folder: Path, death: Death | None, draw: random.Random) -> Group:
        shape = self.shape
        if shape.moves and death is not None:
            shape = Shape(draw.randrange(4), draw.choice([None, HOST]))
        return Group(folder, (death, shape))

    def problems(self, death: Death, board: Board, folder: Path, codes: list[int | None]) -> list[str]:
        if board.numbers[Board.PHASE_THEN] == JOINING:
            return []
        expected = [{-death.number} if f"rank {rank}" in death.victims else {ENDED_BY_AN_ERROR} for rank in range(2)]
        for rank in range(2):
            if board.rows[rank][Board.PHASE] == DONE:
                expected[rank].add(0)
        wrong = [code for code, allowed in zip(codes, expected, strict=True) if code not in allowed | {None}]
        return [f"ended with {codes}, expected {expected}"] if wrong else []

    def result(self, folder: Path):
        left = sorted(path.name for path in (folder / "saved").iterdir())
        steps = [step for step in range(1, NUM_STEPS + 1) if step % SAVE_STEPS == 0 or step == NUM_STEPS]
        expected = ["step"] if self.shape.replaces else [f"step-{step}" for step in steps]
        assert left == expected, f"left {left}, expected {expected}"
        bits = {k: v for rank in range(2) for k, v in json.loads((folder / f"result-{rank}").read_text()).items()}
        if self.shape.moves:  # what a rank has of a bucket depends on the stage at which the run ends
            bits = {name: digest for name, digest in bits.items() if re.search(r"owned|stepped|exp_avg", name) is None}
        return bits


@pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kills", [18, pytest.param(750, marks=pytest.mark.slow)])
def test_killed_ranks_and_workers_resume_to_the_bits_of_a_run_that_was_not_killed(tmp_path, kills):
    tally = Tally()
    for seed, shape in enumerate(SHAPES):
        tally.add(campaign(Ranks(shape), kills // len(SHAPES), seed, tmp_path / str(seed)))
        shutil.rmtree(tmp_path / str(seed)) if not tally.failures else None
        print(f"{shape}: {tally}")
    assert not tally.failures, "\n\n".join(tally.failures)
