"""`zerolite ask MODEL "question"`: one answer as it comes; or a file of questions in, a file of answers out.

The answer alone goes to stdout, everything else to stderr.
"""

import sys
from pathlib import Path

from zerolite.medqa import terminal
from zerolite.medqa.data import Conversation
from zerolite.medqa.generation import reply
from zerolite.medqa.images import files
from zerolite.medqa.images.rows import with_images
from zerolite.medqa.prompts import prompt_of
from zerolite.medqa.questions import AnswersFile, question_of, read_questions, source_of


def main(argv: list[str] | None = None) -> int:
    return terminal.run("ask", ask, argv)


def ask(argv: list[str]) -> None:
    """Raises ValueError for a mistake of the user."""
    parser = terminal.Parser("ask", "One answer of a model, or answers to a file of questions.")
    parser.add_argument("question", nargs="?", type=terminal.clean)
    parser.add_argument(
        "--image", type=Path, metavar="FILE", action="append", default=[],
        help="a picture that the question is about; repeatable; <image> in the question says where each stands",
    )  # fmt: skip
    parser.add_argument(
        "--image_folder", type=Path, metavar="FOLDER", help="of the images that rows of --questions name"
    )
    parser.add_argument("--questions", type=Path, metavar="FILE", help="JSONL, a JSON array, or a question a line")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="JSONL; what is answered there is not asked again")
    parser.add_argument("--batch_size", type=int, default=8, help="questions of a file asked at once (default: 8)")
    given = parser.parse_intermixed_args(argv)  # options may stand between model and question
    if (given.questions is None) != (given.answers is None) or (given.question is None) == (given.questions is None):
        raise ValueError("expected a question, or --questions FILE and --answers FILE")
    if given.batch_size < 1:
        raise ValueError(f"--batch_size {given.batch_size}: expected at least 1")
    if given.image and given.questions is not None or given.image_folder is not None and given.questions is None:
        raise ValueError("--image is of a question, --image_folder of --questions FILE")
    settings = terminal.settings_of(given)
    if given.questions is not None:
        questions = read_questions(given.questions, given.system, given.image_folder)
        answers = AnswersFile(given.answers)
        opened = terminal.opened(given)
        left = answers.left(questions, source_of(opened, settings))
        room = opened.room - settings.longest(opened.room)
        num_shortened = sum(bool(prompt_of(one, opened.tokenizer, room).loss) for one in left)
        if num_shortened:
            terminal.say(f"{num_shortened} questions have no room in the model; `left_out` in their rows says of what")
        num_written = answers.append(left, opened, settings, given.batch_size)
        terminal.say(f"{num_written} answers written to {given.answers}, {len(questions) - len(left)} were there")
        return
    conversation = Conversation(((question_of(given.question, "question"), ""),), given.system)
    if given.image:
        conversation = with_images(conversation, [files.read(path) for path in given.image])
    opened = terminal.opened(given)
    found = reply(opened, conversation, settings, terminal.write)
    terminal.write("\n")
    if found.prompt.loss:
        terminal.say(f"left out, since the model has no room for it: {found.prompt.loss}")
    if not found.text:
        terminal.say("the model ended its answer without a word")
    if found.is_cut:
        terminal.say(f"the answer was cut off after {settings.longest(opened.room)} tokens (--max_new_tokens)")


if __name__ == "__main__":
    sys.exit(main())
