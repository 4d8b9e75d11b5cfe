"""`zerolite chat MODEL`: a dialogue on the terminal, or with questions from a pipe, a line each; --web: as a page.

Answers go to stdout, everything else to stderr. History that has no room loses its oldest turns, and that is said.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from zerolite.medqa import terminal, web
from zerolite.medqa.answers import CUT_OFF
from zerolite.medqa.data import Conversation
from zerolite.medqa.generation import Settings, reply
from zerolite.medqa.images import files
from zerolite.medqa.images.files import ImageFile
from zerolite.medqa.images.rows import places
from zerolite.medqa.images.sight import sight_of
from zerolite.medqa.opening import Opened
from zerolite.medqa.questions import question_of

COMMANDS = (
    "/reset forgets the dialogue, /system TEXT sets the system text and forgets it too, /image FILE shows a picture "
    "with the next question, /quit or Ctrl-D leaves"
)
PROMPT = "> "


def main(argv: list[str] | None = None) -> int:
    return terminal.run("chat", chat, argv)


def chat(argv: list[str]) -> None:
    """Raises ValueError for a mistake of the user."""
    parser = terminal.Parser("chat", "A dialogue with a model on the terminal, or in the browser (--web).")
    parser.add_argument("--web", action="store_true", help="serve a page to a browser of this machine (Gradio)")
    parser.add_argument("--adapter", type=Path, action="append", default=[], help="of --web: one to choose; repeatable")
    parser.add_argument("--port", type=int, help="of --web (default: the first free one from 7860)")
    parser.add_argument("--host", help="of --web: the address to serve at (default: 127.0.0.1, this machine alone)")
    given = parser.parse_args(argv)
    settings = terminal.settings_of(given)
    if given.web:
        web.run(given)
        return
    if given.adapter:
        raise ValueError(f"--adapter is of --web; here it is: zerolite chat {given.adapter[0]} --base {given.model}")
    if given.port is not None or given.host is not None:
        raise ValueError("--port and --host are of --web")
    dialogue = Dialogue(terminal.opened(given), settings, given.system)
    terminal.say(COMMANDS)
    for line in _lines():
        name, _, text = line.partition(" ")
        if name == "/quit":
            return
        if name == "/reset":
            dialogue.reset()
            terminal.say("the dialogue is forgotten")
        elif name == "/system":
            if text.strip():
                dialogue.reset(text.strip())
            terminal.say(f"system text: {dialogue.system or 'none'}")
        elif name == "/image":
            try:
                dialogue.show(Path(text.strip()))
            except ValueError as error:
                terminal.say(f"error: {error}")
        elif name.startswith("/"):
            terminal.say(f"there is no {name}: {COMMANDS}")
        else:
            try:
                dialogue.ask(line)
            except ValueError as error:  # of this question
                terminal.say(f"error: {error}")


class Dialogue:
    """What was said, and the model that goes on with it."""

    def __init__(self, opened: Opened, settings: Settings, system: str = ""):
        self.opened = opened
        self.settings = settings
        self.system = system
        self.turns: list[tuple[str, str]] = []
        self.images: list[ImageFile] = []  # in the places of the turns
        self.shown: list[ImageFile] = []  # of the next question

    def show(self, file: Path) -> None:
        """A picture of the next question. Raises ValueError where it is none, or the model reads texts alone."""
        sight_of(self.opened.tokenizer)
        self.shown.append(files.read(file))
        terminal.say(f"with the next question: {', '.join(image.path.name for image in self.shown)}")

    def reset(self, system: str | None = None) -> None:
        self.turns, self.images, self.shown = [], [], []
        self.system = self.system if system is None else system

    def ask(self, question: str) -> None:
        """Write the answer as it comes; the turn is history then. Ctrl-C on a terminal ends the answer alone."""
        question = places(self.shown) + question_of(question, "question")
        images = (*self.images, *self.shown)
        conversation = Conversation((*self.turns, (question, "")), self.system, images=images)
        said: list[str] = []

        def write(text: str) -> None:
            said.append(text)
            terminal.write(text)

        try:
            found = reply(self.opened, conversation, self.settings, write)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            terminal.write("\n")
            terminal.say("the answer was stopped; Ctrl-C once more leaves")
            answer = "".join(said)
        else:
            terminal.write("\n")
            answer = found.text.removesuffix(CUT_OFF) if found.is_cut else found.text
            self.turns = self.turns[found.prompt.num_turns_lost :]
            images = found.prompt.images
            if found.prompt.loss:
                terminal.say(f"forgotten, since the model has no room for it: {found.prompt.loss}")
        if answer.strip():
            self.turns.append((question, answer))
            self.images, self.shown = list(images), []


def _lines() -> Iterator[str]:
    """What the user types or pipes in, without blank lines, to its end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # editing and history of `input`
    while True:
        try:
            line = input(PROMPT) if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        if not line and not sys.stdin.isatty():
            return
        if line := terminal.clean(line).strip():
            yield line


if __name__ == "__main__":
    sys.exit(main())
