"""A run that is killed and resumed, again and again, ends with the bits of one that nobody disturbed.

A `Target` says how a run is started and what it leaves. Its processes call `Board.join`; the board is a file that they
share and that outlives them: who they are, what they are doing, how far they have come. A `Death` says when, who and
how: at a moment of wall time, or at the n-th call of a named point, where the process itself sends the signals. A run
dies several times before it may end, so one comparison of bits serves several kills.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
from limits import Limit, until

PHASES = JOINING, STARTING, RESUMING, TRAINING, SAVING, DONE = range(6)
NAMES = ["joining", "starting", "resuming", "training", "saving", "done"]
SOON_S = 5.0  # from the death of one process to the end of all, on a quiet machine
# Where gloo has read the head of a message when the peer's death is seen, its receive waits for the group's timeout.
END_S = 40.0
ORPHAN_S = 5.0  # from the end of the ranks to that of their workers
RUN_S = 90.0
MOST_KILLS = 8  # of one run
MAX_RANKS, MAX_WORKERS = 2, 4
HEADER = 5

COLLECTIVES, POOL = "zerolite.runtime.collectives", "zerolite.offload.pool"
ATOMIC, LOAD = "zerolite.runtime.atomic_dir", "zerolite.checkpoint.load"

# Where a process can die, by what it is doing then: a function, by its module.
PLACES: dict[int, dict[str, tuple[str, str]]] = {
    TRAINING: {
        "in a reduce-scatter": (COLLECTIVES, "ExchangeGroup.reduce_scatter"),
        "in the sum of a reduce-scatter": (COLLECTIVES, "sum_in_rank_order"),
        "in an all-gather": (COLLECTIVES, "ExchangeGroup.all_gather"),
        "in the exchange of a few numbers": (COLLECTIVES, "ExchangeGroup.all_gather_scalars"),
        "in a worker's step": (POOL, "Pool.submit"),
        "in a wait for a worker": (POOL, "Pool.wait"),
        "in a backward": ("zerolite.engine.engine", "Engine.post_backward"),
        "in a fetch": ("zerolite.engine.engine", "Engine.fetch"),
    },
    SAVING: {
        "in writing a rank's file": ("zerolite.runtime.safetensors_file", "write_safetensors"),
        "in writing the manifest": ("zerolite.checkpoint.save", "write_manifest"),
        "in a sync": (ATOMIC, "sync_file"),
        "in a commit": (ATOMIC, "commit_folder"),
        "in a rename": ("os", "rename"),
        "in the exchange of two folders": (ATOMIC, "_exchange"),
        "in the removal of a folder": ("shutil", "rmtree"),
    },
    RESUMING: {
        "in opening a checkpoint": ("zerolite.checkpoint.saved_files", "SavedFolder.open"),
        "in hashing a checkpoint": ("zerolite.checkpoint.saved_files", "SavedFolder.open_files"),
        "in reading a checkpoint": (LOAD, "_read"),
        "in restoring the optimizer": (LOAD, "_restore_optimizer"),
    },
}
POINTS = {point: where for places in PLACES.values() for point, where in places.items()}


@dataclass(frozen=True)
class Death:
    """When: `moment` seconds after the start, or before or after the `count`-th call of `point` on rank `rank`."""

    victims: tuple[str, ...]  # "rank 0", "rank 1", "worker" (of `rank`), "agent"
    number: int  # of the signal
    rank: int = 0
    moment: float | None = None
    point: str | None = None
    count: int = 1
    is_after: bool = False
    restarts: int = 0  # that torchrun may do

    def __str__(self) -> str:
        if self.point is None:
            when = f"after {self.moment:.2f} s"
        else:
            when = f"{self.point}, {'after' if self.is_after else 'before'} call {self.count} of rank {self.rank}"
        again = f", {self.restarts} restarts" if self.restarts else ""
        return f"{signal.Signals(self.number).name} to {' and '.join(self.victims)} {when}{again}"


class Board:
    """Numbers in a file that all processes of a run share; the phase and the step of each rank among them."""

    IS_STRUCK, PHASE_THEN, STEP_THEN, AGENT, HAS_CHECKPOINT = range(HEADER)
    PHASE, STEP, PID, WORKERS = range(4)  # of a rank's row
    ROW = WORKERS + MAX_WORKERS + len(POINTS)  # how often each point was called, in runs where nobody dies

    def __init__(self, path: Path):
        numel = HEADER + MAX_RANKS * self.ROW
        if not path.exists():
            path.write_bytes(bytes(8 * numel))
        self.numbers = np.memmap(path, dtype=np.int64, mode="r+", shape=(numel,))
        self.rows = self.numbers[HEADER:].reshape(MAX_RANKS, self.ROW)

    def join(self, rank: int, death: Death | None) -> None:
        """As rank `rank`: say who this is, and arrange for the death, unless the run has died of it already."""
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # where it hangs, for a failure
        row = self.rows[rank]
        row[: -len(POINTS)] = 0
        row[self.PID] = os.getpid()
        pool = importlib.import_module("zerolite.offload.pool").Pool
        start = pool.__init__

        def note_workers(self_, *args, **options):
            start(self_, *args, **options)
            pids = [process.pid for process in self_.processes]
            row[self.WORKERS : self.WORKERS + len(pids)] = pids

        pool.__init__ = note_workers
        if death is None:
            for index, point in enumerate(POINTS, start=self.ROW - len(POINTS)):
                at(point, lambda index=index: row.__setitem__(index, row[index] + 1))
        elif death.point is not None and death.rank == rank and not self.numbers[self.IS_STRUCK]:
            at(death.point, self._countdown(death), is_after=death.is_after)

    def _countdown(self, death: Death) -> Callable[[], None]:
        calls_left = death.count

        def tick() -> None:
            nonlocal calls_left
            calls_left -= 1
            if calls_left == 0:
                self.strike(death)

        return tick

    def counts(self, rank: int) -> dict[str, int]:
        """How often each point was called on a rank, without those that were not."""
        return {point: int(n) for point, n in zip(POINTS, self.rows[rank][-len(POINTS) :], strict=True) if n}

    def set_phase(self, rank: int, phase: int) -> None:
        self.rows[rank][self.PHASE] = phase

    def set_step(self, rank: int, step: int) -> None:
        self.rows[rank][self.STEP] = step

    def pids(self) -> list[int]:
        """Of all ranks and workers that have joined."""
        return [int(pid) for row in self.rows for pid in row[self.PID : -len(POINTS)] if pid]

    def strike(self, death: Death) -> None:
        """Send the signals, to this process last."""
        self.numbers[self.PHASE_THEN], self.numbers[self.STEP_THEN] = self.rows[death.rank][: self.PID]
        self.numbers[self.IS_STRUCK] = 1
        victims = [self._pid(victim, death.rank) for victim in death.victims]
        for pid in sorted(victims, key=lambda pid: pid == os.getpid()):
            if pid:
                try:
                    os.kill(pid, death.number)
                except ProcessLookupError:
                    pass  # it ended by itself in this moment

    def _pid(self, victim: str, rank: int) -> int:
        if victim == "agent":
            return int(self.numbers[self.AGENT])
        if victim == "worker":
            return int(self.rows[rank][self.WORKERS])
        return int(self.rows[int(victim.removeprefix("rank "))][self.PID])


def at(point: str, act: Callable[[], None], is_after: bool = False) -> None:
    """Have every call of the point begin with `act()`, or end with it."""
    module, name = POINTS[point]
    owner = importlib.import_module(module)
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def wrapped(*args, **options):
        if not is_after:
            act()
        result = function(*args, **options)
        if is_after:
            act()
        return result

    setattr(owner, attribute, wrapped)


class Run(Protocol):
    """A started run."""

    def codes(self) -> list[int | None]:
        """Exit codes of the processes that were started; None for one that goes on."""

    def kill(self) -> None:
        """End them all."""

    def tail(self) -> str:
        """The end of what they printed, for a failure."""


@dataclass(frozen=True)
class Undisturbed:
    """What a run did, and then one that went on from its last checkpoint, that were not killed."""

    seconds: float  # of both
    counts: tuple[dict[str, int], ...]  # of calls of each point, by rank

    def moment(self, draw: random.Random) -> dict:
        """When to die, as fields of a Death: by the clock, or at a point of training, saving or resuming."""
        if draw.random() < 0.3:
            return {"moment": draw.uniform(0, 0.6 * self.seconds)}
        rank = draw.randrange(len(self.counts))
        places = PLACES[draw.choice([TRAINING, SAVING, RESUMING])]
        point = draw.choice([point for point in places if point in self.counts[rank]] or list(self.counts[rank]))
        count = 1 + int(self.counts[rank][point] * draw.random() ** 2)  # a resumed run has fewer
        return {"rank": rank, "point": point, "count": count, "is_after": draw.random() < 0.5}


class Target(Protocol):
    has_agent: bool  # that ends the others where one dies before it has joined them

    def draw(self, draw: random.Random, lived: Undisturbed) -> Death:
        """Who dies how, where and when."""

    def start(self, folder: Path, death: Death | None, draw: random.Random) -> Run:
        """Start, or resume, the run of `folder`, whose board is at folder / "board"."""

    def problems(self, death: Death, board: Board, folder: Path, codes: list[int | None]) -> list[str]:
        """What is wrong with how a run ended that was struck."""

    def result(self, folder: Path) -> dict[str, object]:
        """What a complete run left, by name. AssertionError where it left more or less than it should."""


@dataclass
class Tally:
    """What a campaign has counted."""

    kills: int = 0
    runs: int = 0
    by_phase: Counter = field(default_factory=Counter)
    by_victim: Counter = field(default_factory=Counter)
    late: int = 0  # that ended after SOON_S
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def listed(counter: Counter) -> str:
            return ", ".join(f"{count} {name}" for name, count in counter.most_common())

        return (
            f"{self.kills} kills in {self.runs} runs ({listed(self.by_phase)}; {listed(self.by_victim)}), "
            f"{self.late} whose others ended by the group's timeout: {len(self.failures)} failures"
        )

    def fail(self, text: str) -> None:
        self.failures.append(text)
        print(text)

    def add(self, other: Tally) -> None:
        self.kills += other.kills
        self.runs += other.runs
        self.late += other.late
        self.by_phase += other.by_phase
        self.by_victim += other.by_victim
        self.failures += other.failures


def campaign(target: Target, kills: int, seed: int, root: Path) -> Tally:
    """Kill runs of `target` so many times; each then resumes, undisturbed, and is compared with one that never died."""
    draw, tally = random.Random(seed), Tally()
    expected, lived = _live_undisturbed(target, root / "undisturbed", draw, tally)
    while tally.kills < kills and len(tally.failures) < 10:
        folder = root / f"run-{tally.runs}"
        tally.runs += 1
        is_done = False
        for _ in range(draw.randint(MOST_KILLS // 2, MOST_KILLS)):
            is_done = _kill_once(target, folder, target.draw(draw, lived), draw, tally)
            if is_done or tally.kills == kills:
                break
        if not is_done:
            _finish(target, folder, draw, tally)
        try:
            found = target.result(folder)
            if differing := {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}:
                tally.fail(f"seed {seed}, {folder.name}: ends with another {', '.join(sorted(differing)[:9])}")
        except (AssertionError, LookupError, OSError, ValueError) as error:
            tally.fail(f"seed {seed}, {folder.name}: {type(error).__name__} {error}")
        if not tally.failures:
            shutil.rmtree(folder)
    return tally


def _live_undisturbed(target: Target, folder: Path, draw: random.Random, tally: Tally) -> tuple[dict, Undisturbed]:
    """What runs that are not killed leave, and what they did."""
    began = time.monotonic()
    _finish(target, folder, draw, tally)
    expected, first = target.result(folder), Board(folder / "board")
    _finish(target, folder, draw, tally)
    assert target.result(folder) == expected, "a run that only loads its last checkpoint ends with other bits"
    seconds, second = time.monotonic() - began, Board(folder / "board")
    counts = [{**second.counts(rank), **first.counts(rank)} for rank in range(MAX_RANKS)]
    return expected, Undisturbed(seconds, tuple(counts))


def _kill_once(target: Target, folder: Path, death: Death, draw: random.Random, tally: Tally) -> bool:
    """Start the run and have it die; whether it came to its end before that."""
    board = _new_board(folder)
    run, began = target.start(folder, death, draw), time.monotonic()
    limit = Limit(RUN_S)
    while None in run.codes() and not board.numbers[Board.IS_STRUCK] and not limit.is_over():
        if death.moment is not None and time.monotonic() - began >= death.moment:
            board.strike(death)
        time.sleep(0.01)
    if board.numbers[Board.IS_STRUCK]:
        if board.numbers[Board.PHASE_THEN] == JOINING and not target.has_agent:
            run.kill()  # others wait for it in torch's rendezvous, which is none of zerolite's
        if not until(lambda: None not in run.codes(), RUN_S if death.restarts else SOON_S):
            tally.late += 1
        has_ended = until(lambda: None not in run.codes(), END_S)
        phase = NAMES[board.numbers[Board.PHASE_THEN]]
        if board.numbers[Board.PHASE_THEN] < DONE:  # else there was nobody to be killed
            tally.kills += 1
            tally.by_phase[phase] += 1
            tally.by_victim[f"{signal.Signals(death.number).name} {' + '.join(death.victims)}"] += 1
        pids = board.pids()
        has_died = until(lambda: not any(map(is_running, pids)), ORPHAN_S)
        problems = target.problems(death, board, folder, run.codes())
        if not has_ended:
            problems.insert(0, f"did not end in {END_S:.0f} s")
        if not has_died:
            left = [pid for pid in pids if is_running(pid)]
            problems.append(f"{left} of {pids} still run")
            for row in board.rows:
                if int(row[Board.PID]) in left:
                    os.kill(int(row[Board.PID]), signal.SIGUSR1)
            time.sleep(0.5)
        if problems:
            tally.fail(f"{folder.name}, {phase}, {death}: {'; '.join(problems)}\n{run.tail()}")
    elif run.codes() != [0] * len(run.codes()):
        tally.fail(f"{folder.name}, not struck ({death}): ended with {run.codes()}\n{run.tail()}")
    is_done = run.codes() == [0] * len(run.codes())
    run.kill()
    return is_done


def _finish(target: Target, folder: Path, draw: random.Random, tally: Tally) -> None:
    """Resume the run and let it come to its end."""
    _new_board(folder)
    run = target.start(folder, None, draw)
    until(lambda: None not in run.codes(), RUN_S)
    if run.codes() != [0] * len(run.codes()):
        tally.fail(f"{folder.name}, resumed undisturbed: ended with {run.codes()}\n{run.tail()}")
    run.kill()


def _new_board(folder: Path) -> Board:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "board").unlink(missing_ok=True)
    return Board(folder / "board")


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
