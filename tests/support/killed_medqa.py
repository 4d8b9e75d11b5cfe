"""train_medqa.py whose ranks tell a board what they do, and die as the environment says: started as that is.

KILLS is the folder of the board and, where somebody dies, the fields of the Death, in JSON.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

from deaths import DONE, RESUMING, SAVING, STARTING, TRAINING, Board, Death

import train_medqa
from zerolite.medqa import curves, divergence, processes, resume, tuning


def between(board: Board, rank: int, before: int | None, function: Callable, after: int | None = None) -> Callable:
    """`function` with the phase set when it begins and when it has returned."""

    @functools.wraps(function)
    def wrapped(*args, **options):
        if before is not None:
            board.set_phase(rank, before)
        result = function(*args, **options)
        if after is not None:
            board.set_phase(rank, after)
        return result

    return wrapped


def main() -> int:
    folder, death = json.loads(os.environ["KILLS"])
    rank, board = processes.environment_rank(), Board(Path(folder) / "board")
    board.join(rank, Death(**death) if death else None)
    train_medqa.answer = lambda *arguments: []  # what is told about a result costs more than the result
    curves.plot = lambda folder: None
    processes.join = between(board, rank, None, processes.join, STARTING)
    resume.load_newest = between(board, rank, RESUMING, resume.load_newest)
    resume.save = between(board, rank, SAVING, resume.save, TRAINING)
    tuning.write_result = between(board, rank, SAVING, tuning.write_result, TRAINING)
    train_medqa.train = between(board, rank, TRAINING, train_medqa.train, DONE)
    add = divergence.Divergence.add

    def add_and_tell(self, step: int, optimizer) -> None:
        board.set_step(rank, step)
        add(self, step, optimizer)

    divergence.Divergence.add = add_and_tell
    return train_medqa.main()


if __name__ == "__main__":
    processes.leave(main())
