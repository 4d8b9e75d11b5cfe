"""What stands behind the pages of `zerolite chat MODEL --web`: one model, one answer at a time, dialogues apart.

Answers are generated on one thread, first come, first served. A page reads the parts of its own and may stop it, also
while it waits.
"""

import queue
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from zerolite.medqa.answers import CUT_OFF
from zerolite.medqa.data import Conversation
from zerolite.medqa.generation import Reply, Settings, Stream, replies
from zerolite.medqa.images import files
from zerolite.medqa.images.files import ImageFile
from zerolite.medqa.images.rows import places
from zerolite.medqa.images.sight import SIGHTS
from zerolite.medqa.opening import Variant
from zerolite.medqa.processes import without_secrets
from zerolite.medqa.prompts import Prompt
from zerolite.medqa.questions import question_of


class Stopped(Exception):
    """The answer is not wanted any more."""


class StoppableStream(Stream):
    """A stream whose generation ends at the next token after `stopped` is set."""

    def __init__(self, tokenizer, write, stopped: threading.Event):
        super().__init__(tokenizer, write)
        self.stopped = stopped

    def put(self, value: torch.Tensor) -> None:
        if self.stopped.is_set():
            raise Stopped
        super().put(value)


class Running:
    """An answer that is generated, or waits for its turn; iterating over it gives its parts as they come."""

    def __init__(self, worker: ThreadPoolExecutor, variant: Variant, conversation: Conversation, settings: Settings):
        self.parts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.future: Future[Reply] = worker.submit(self._generate, variant, conversation, settings)
        self.future.add_done_callback(lambda _: self.parts.put(None))  # also of one that was cancelled

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts.get, None)

    def stop(self) -> None:
        self.stopped.set()
        self.future.cancel()  # where it has not begun

    def _generate(self, variant: Variant, conversation: Conversation, settings: Settings) -> Reply:
        stream = StoppableStream(variant.opened.tokenizer, self.parts.put, self.stopped)
        with variant.active():
            (found,) = replies(variant.opened, [conversation], settings, stream)
        stream.finish(found.text)
        return found


@dataclass(frozen=True)
class Said:
    """What a page shows of an answer so far."""

    text: str = ""
    num_before: int = 0  # answers that are to end before this one begins
    prompt: Prompt | None = None  # of an answer that has ended
    limit: int = 0  # tokens after which it was cut off
    is_stopped: bool = False
    is_new_dialogue: bool = False  # other settings: what was said before is not history
    error: str = ""


@dataclass
class Dialogue:
    """What one page has said, to whom."""

    variant: str | None = None
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)
    images: tuple[ImageFile, ...] = ()  # in the places of the turns


class Desk:
    """The model that pages ask."""

    def __init__(self, variants: dict[Path | None, Variant], settings: Settings):
        self.variants = {path and str(path): variant for path, variant in variants.items()}
        self.settings = settings
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self.running: dict[str, Running] = {}  # by the page

    @property
    def first(self) -> str | None:
        """The variant that a page begins with."""
        return next(iter(self.variants))

    @property
    def is_seeing(self) -> bool:
        """Whether the model reads images."""
        return any(variant.opened.tokenizer in SIGHTS for variant in self.variants.values())

    def answer(
        self,
        page: str,
        dialogue: Dialogue,
        variant: str | None,
        system: str,
        question: str,
        pictures: Sequence[Path] = (),
    ) -> Iterator[Said]:
        """The answer as it comes; it is a turn of `dialogue` then, also where it was stopped. Nothing is raised."""
        is_new = bool(dialogue.turns) and (dialogue.variant, dialogue.system) != (variant, system.strip())
        if (dialogue.variant, dialogue.system) != (variant, system.strip()):
            dialogue.variant, dialogue.system, dialogue.turns, dialogue.images = variant, system.strip(), [], ()
        text = ""
        try:
            shown = [files.read(path) for path in pictures]
            question = places(shown) + question_of(question, "question")
            images = (*dialogue.images, *shown)
            conversation = Conversation((*dialogue.turns, (question, "")), dialogue.system, images=images)
            num_before = sum(not other.future.done() for other in self.running.values())
            chosen = self.variants[variant]
            running = self.running[page] = Running(self.worker, chosen, conversation, self.settings)
            try:
                yield Said(num_before=num_before, is_new_dialogue=is_new)
                for part in running:
                    text += part
                    yield Said(text, is_new_dialogue=is_new)
            finally:  # also where the page was closed
                running.stop()
                if self.running.get(page) is running:
                    del self.running[page]
            if running.future.cancelled() or isinstance(running.future.exception(), Stopped):
                if text.strip():
                    dialogue.turns.append((question, text))
                    dialogue.images = images
                yield Said(text, is_stopped=True, is_new_dialogue=is_new)
                return
            found = running.future.result()
        except Exception as error:  # shown: a page that went dead would say nothing
            if not isinstance(error, ValueError):
                traceback.print_exc(file=sys.stderr)
            told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            yield Said(text, is_new_dialogue=is_new, error=without_secrets(told))
            return
        del dialogue.turns[: found.prompt.num_turns_lost]
        said = found.text.removesuffix(CUT_OFF) if found.is_cut else found.text
        if said.strip():
            dialogue.turns.append((question, said))
            dialogue.images = found.prompt.images
        limit = self.settings.longest(chosen.opened.room) if found.is_cut else 0
        yield Said(found.text, prompt=found.prompt, limit=limit, is_new_dialogue=is_new)

    def stop(self, page: str) -> None:
        """End the answer of a page, if there is one."""
        if running := self.running.get(page):
            running.stop()

    def close(self) -> None:
        for running in list(self.running.values()):
            running.stop()
        self.worker.shutdown(wait=True, cancel_futures=True)
