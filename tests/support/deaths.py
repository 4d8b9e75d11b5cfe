"""Who of a run dies, when and how; and what its processes say of themselves until then.

They call `Board.join`. The board is a file that they share and that outlives them: who they are, what they are doing,
how far they have come. A `Death` is at a moment of wall time, or at the n-th call of a named point, where the process
itself sends the signals.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PHASES = JOINING, STARTING, RESUMING, TRAINING, SAVING, DONE = range(6)
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
