"""The journal of a folder: what was asked, answered and lost, a line each, which survives a kill.

An answer is on the disk (fsync) before it is counted. A line `sent` stands before its request leaves, so what was in
flight when a run was killed is charged in full, and the ceilings hold over all runs of the folder.
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from zerolite.medqa.generate.ledger import Tokens
from zerolite.medqa.rows import shown

NAME = "journal.jsonl"


@dataclass(frozen=True)
class Answer:
    """What the endpoint said to a request."""

    id: str  # of the request
    text: str
    finish: str  # finish_reason, "refusal" where the message has one, "key" for a text that held the key
    tokens: Tokens
    model: str  # as the endpoint names it
    time: str  # UTC


class Journal:
    """The open journal of one folder, for one run at a time.

    Raises ValueError where another run has it open, where a line is none of ours, and where it is of another plan.
    """

    def __init__(self, folder: Path, plan: dict[str, object]):
        """plan: what the requests depend on, which must be that of the runs before."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        self.answers: dict[str, Answer] = {}
        self.lost: dict[str, str] = {}  # the last error of each request that has no answer
        self.spent = Tokens()  # by runs before
        self.num_interrupted = 0  # requests that were in flight when a run ended
        self._file = open(self.path, "ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{folder}: another run is writing it") from None
        try:
            self._read(plan)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, plan: dict[str, object]) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)  # what a kill left behind is no line
        open_requests: dict[str, Tokens] = {}
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            try:
                entry = json.loads(line)
                if number == 1:
                    found = entry["plan"]
                else:
                    self._add(entry, open_requests)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f"{self.path}, line {number}: is no line of a journal; name a new folder") from None
            if number == 1 and (other := [key for key in plan if found.get(key) != plan[key]]):
                told = ", ".join(f"{key} was {shown(found.get(key))} and is {shown(plan[key])}" for key in other)
                raise ValueError(f"{self.path} is of another plan: {told}; name a new --output_dir")
        if not whole:
            self._write({"plan": plan})
            os.fsync(self._file.fileno())
        self.num_interrupted = len(open_requests)
        for tokens in open_requests.values():
            self.spent += tokens

    def _add(self, entry: dict, open_requests: dict[str, Tokens]) -> None:
        name, tokens = entry["id"], Tokens(*entry["tokens"])
        if entry["kind"] == "sent":
            self.spent += open_requests.get(name, Tokens())  # a run was killed before it ended
            open_requests[name] = tokens
            return
        open_requests.pop(name)
        self.spent += tokens
        if entry["kind"] == "lost":
            self.lost[name] = entry["error"]
        else:
            finish, model, time = entry["finish"], entry["model"], entry["time"]
            self.answers[name] = Answer(name, entry["text"], finish, tokens, model, time)
            self.lost.pop(name, None)

    def sent(self, name: str, tokens: Tokens) -> None:
        """A request is about to leave, which may cost so much."""
        self._write({"kind": "sent", "id": name, "tokens": [tokens.prompt, tokens.completion]})

    def lose(self, name: str, error: str, tokens: Tokens) -> None:
        """A request has ended without an answer; tokens: what it may have cost."""
        self._write({"kind": "lost", "id": name, "tokens": [tokens.prompt, tokens.completion], "error": error})
        self.lost[name] = error

    def add(self, answer: Answer) -> None:
        """Write an answer to the disk, then count it."""
        tokens = [answer.tokens.prompt, answer.tokens.completion]
        self._write({"kind": "answer", **asdict(answer), "tokens": tokens})
        os.fsync(self._file.fileno())
        self.answers[answer.id] = answer
        self.lost.pop(answer.id, None)

    def _write(self, entry: dict) -> None:
        size = os.fstat(self._file.fileno()).st_size
        line = memoryview(json.dumps(entry, ensure_ascii=True).encode() + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(size)  # other requests still write theirs
            raise
