"""A rank that waits for long in a collective is told what the others do: [Note: one rank alone].

[Note: one rank alone]
A call that every rank must make, made by some alone, waits for the others until the process group's timeout. Over gloo
a rank that goes on to another collective is found at once; one that makes none, and any over NCCL, is not. So a rank
that has waited for `PATIENCE_SECONDS` asks the others where they are and warns with all answers, then again after four
times as long. Nobody is ended for that: another rank may well take its time.
"""

import time
import warnings
from collections.abc import Sequence
from typing import Protocol

from zerolite.runtime.whereabouts import whereabouts

PATIENCE_SECONDS = 60.0
ANSWER_SECONDS = 3.0  # a listener looks once a second
ASKS, ANSWERS = "zerolite/asks", "zerolite/answers"


class Work(Protocol):
    def is_completed(self) -> bool: ...


class Waits:
    """This process's waits for collectives, as the threads that wait write them: nothing here may cost them time."""

    count = 0  # that began
    label: str | None = None  # of the collective that a thread waits for now
    work: Work | None = None  # NCCL's last: no thread waits for it, but what reads its result
    work_label = ""

    @classmethod
    def present(cls) -> str | None:
        """What this process waits for now."""
        if cls.label is None and cls.work is not None and not cls.work.is_completed():
            return cls.work_label
        return cls.label


class LongWaits:
    """One rank's listener looks here once a second."""

    def __init__(self, store, rank: int, world_size: int):
        self.store, self.rank, self.world_size = store, rank, world_size
        Waits.label = Waits.work = None  # of a world that failed
        self._answered = 0  # the last question
        self._seen, self._since, self._patience = -1, 0.0, PATIENCE_SECONDS

    def look(self) -> None:
        """Answer the others, and ask them where this rank has waited for long."""
        self._answer()
        now, label = time.monotonic(), Waits.present()
        if Waits.count != self._seen or label is None:
            self._seen, self._since, self._patience = Waits.count, now, PATIENCE_SECONDS
        elif now - self._since > self._patience:
            self._patience *= 4
            words = "; ".join(self._ask())
            warnings.warn(
                f"rank {self.rank} has waited {now - self._since:.0f} s for other ranks in {label}. {words}. What "
                "communicates is to be called by every rank",
                stacklevel=1,
            )

    def _answer(self) -> None:
        asked = self.store.add(ASKS, 0)
        if asked > self._answered:
            self._answered = asked
            self.store.set(f"{ANSWERS}/{self.rank}", f"{asked} {whereabouts()}")

    def _ask(self) -> list[str]:
        """What every rank is doing, in rank order."""
        number = self.store.add(ASKS, 1)
        self._answer()
        deadline = time.monotonic() + ANSWER_SECONDS
        words: dict[int, str] = {}
        while len(words) < self.world_size and time.monotonic() < deadline:
            for rank in range(self.world_size):
                key = f"{ANSWERS}/{rank}"
                if rank not in words and self.store.check([key]):
                    asked, word = self.store.get(key).decode().split(" ", 1)
                    if int(asked) >= number:
                        words[rank] = word
            time.sleep(0.1)
        return in_words([words.get(rank) for rank in range(self.world_size)])


def in_words(words: Sequence[str | None]) -> list[str]:
    """A rank each: what it said, or that it said nothing."""
    return [f"rank {rank} is {word or 'gone, or does not answer'}" for rank, word in enumerate(words)]
