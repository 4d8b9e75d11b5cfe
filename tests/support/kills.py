"""A run that is killed and resumed, again and again, ends with the bits of one that nobody disturbed.

A `Target` says how a run is started and what it leaves; deaths.py says who of it dies, when and how. A run dies several
times before it may end, so one comparison of bits serves several kills.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
from deaths import DONE, JOINING, MAX_RANKS, PLACES, RESUMING, SAVING, TRAINING, Board, Death
from limits import Limit, until

NAMES = ["joining", "starting", "resuming", "training", "saving", "done"]
SOON_S = 5.0  # from the death of one process to the end of all, on a quiet machine
# Where gloo has read the head of a message when the peer's death is seen, its receive waits for the group's timeout.
END_S = 40.0
ORPHAN_S = 5.0  # from the end of the ranks to that of their workers
RUN_S = 90.0
MOST_KILLS = 8  # of one run


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
    late: int = 0  # kills whose others ended after SOON_S
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def listed(counter: Counter) -> str:
            return ", ".join(f"{count} {name}" for name, count in counter.most_common())

        return (
            f"{self.kills} kills in {self.runs} runs ({listed(self.by_phase)}; {listed(self.by_victim)}), "
            f"{self.late} whose others ended after {SOON_S:.0f} s: {len(self.failures)} failures"
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
