"""Rows with images: the public layouts, and where in a row's questions each image stands.

`images` is a list of file names, `image` one of them (LLaVA, LLaMA-Factory). A message may have OpenAI's content parts.
In a question `<image>` is the place of the next one. A row that has images and no place at all has them before its
first question.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from zerolite.medqa import prompts, rows
from zerolite.medqa.images import files
from zerolite.medqa.images.files import ImageFile
from zerolite.medqa.rows import PLACE, Conversation, Row, is_absent, shown

KEYS = ("images", "image")
Reading = Callable[[object, Counter[str] | None], Row]  # what a row says; the counter takes keys that are not used
# The line feeds that people write around a place: the template puts its own there.
AROUND = re.compile(rf"\s*\n\s*(?={PLACE})|(?<={PLACE})\s*\n\s*")


def usable(folder: Path, of_text: Reading = rows.usable) -> Reading:
    """As `of_text`, with images, which are files below `folder`. Raises ValueError where there is no such folder."""
    read = reader(folder)

    def of(row: object, ignored: Counter[str] | None = None) -> Row:
        plain, names = apart(row)
        found = of_text(plain, ignored)
        if isinstance(found, Conversation):
            return with_images(found, [read(name) for name in names], _places(plain))
        if names:
            raise ValueError("`images` beside `text`: an image stands in a question, and a text has none")
        return found

    return of


def reader(folder: Path) -> Callable[[object], ImageFile]:
    """Gives the file below `folder` of a name, decoded once. Raises ValueError where there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"--image_folder {folder}: expected a folder, there is none")
    known: dict[Path, ImageFile | str] = {}

    def read(name: object) -> ImageFile:
        path = files.inside(folder, name)
        if path not in known:
            try:
                known[path] = files.read(path)
            except ValueError as error:
                known[path] = str(error)
        found = known[path]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    return read


def fitting(of: Reading, tokenizer: PreTrainedTokenizerBase, cutoff_len: int) -> Reading:
    """`of`, with ValueError for a row with images that has no room in `cutoff_len`: it is told with its line."""

    def checked(row: object, ignored: Counter[str] | None = None) -> Row:
        found = of(row, ignored)
        if isinstance(found, Conversation) and found.images:
            prompts.check_room(found, tokenizer, cutoff_len)
        return found

    return checked


def with_images(conversation: Conversation, images: list[ImageFile], num_places: int | None = None) -> Conversation:
    """The conversation with images in the places of its questions.

    num_places: that its row has in all, where answers without loss were dropped from its end. Raises ValueError where
    places and images are not as many, and for a place outside of a question.
    """
    turns = conversation.turns
    counts = [question.count(PLACE) for question, _ in turns]
    num_places = sum(counts) if num_places is None else num_places
    if images and not num_places:
        turns = ((places(images) + turns[0][0], turns[0][1]), *turns[1:])
        counts = [len(images), *counts[1:]]
        num_places = len(images)
    if num_places != len(images):
        raise ValueError(f"has {num_places} places for images ({PLACE}), and {len(images)} images: expected as many")
    if not images:
        return conversation
    if any(PLACE in text for text in (conversation.system, *(answer for _, answer in turns))):
        raise ValueError(f"{PLACE} stands in an answer or a system text: expected it in questions alone")
    turns = tuple((AROUND.sub("", question), answer) for question, answer in turns)
    if empty := [question for question, _ in turns if is_absent(question.replace(PLACE, ""))]:
        raise ValueError(f"question: is empty but for its images ({shown(empty[0])})")
    return dataclasses.replace(conversation, turns=turns, images=tuple(images[: sum(counts)]))


def places(images: Sequence[ImageFile]) -> str:
    """What stands before a question that these images are of."""
    return PLACE * len(images)


def apart(row: object) -> tuple[object, list[object]]:
    """(the row without its images, their names in the order of their places).

    Raises ValueError where a row names images in two ways.
    """
    if not isinstance(row, dict):
        return row, []
    given = [key for key in KEYS if not is_absent(row.get(key))]
    if len(given) > 1:
        raise ValueError("has both `images` and `image`: expected one of them")
    value = row[given[0]] if given else []
    names = list(value) if isinstance(value, list) else [value]
    plain = {key: value for key, value in row.items() if key not in KEYS}
    messages = plain.get("messages")
    if isinstance(messages, list):
        of_parts: list[object] = []
        plain["messages"] = [_without_parts(one, number, of_parts) for number, one in enumerate(messages)]
        if names and of_parts:
            raise ValueError(f"has images in `{given[0]}` and in its messages' parts: expected one of them")
        names = names or of_parts
    return plain, names


def _without_parts(message: object, number: int, names: list[object]) -> object:
    """A message whose content is parts, as one text with places; the names that its parts have go to `names`."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            continue
        if kind not in ("image", "image_url"):
            raise ValueError(f"message {number}: expected parts of type text or image, got {shown(part)}")
        value = next((part[key] for key in ("image", "image_url", "path", "url") if not is_absent(part.get(key))), None)
        value = value.get("url") if isinstance(value, dict) and "url" in value else value
        names += [] if value is None else [value]
        texts.append(PLACE)
    return {**message, "content": "".join(texts)}


def _places(value: object) -> int:
    """Places in all texts of a row."""
    if isinstance(value, str):
        return value.count(PLACE)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_places, inner))
