"""Images of coloured squares that tests draw, and questions about them in English and Chinese."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw
from seeing_models import SIDE

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220)}
CHINESE = {"red": "红色", "blue": "蓝色"}
NUMBERS = {"en": ("None.", "One.", "Two.", "Three.", "Four."), "zh": ("没有。", "一个。", "两个。", "三个。", "四个。")}
CELL = SIDE // 2


def draw(file: Path, cells: list[str | None], random: random.Random) -> None:
    """A picture of two by two cells; in each a square of a colour, or nothing. No two pictures have the same shades."""

    def shade(colour: tuple[int, int, int]) -> tuple[int, ...]:
        return tuple(min(255, max(0, value + random.randint(-25, 25))) for value in colour)

    image = Image.new("RGB", (SIDE, SIDE), shade((240, 240, 240)))
    pen = ImageDraw.Draw(image)
    for number, colour in enumerate(cells):
        if colour is not None:
            x, y = (number % 2) * CELL, (number // 2) * CELL
            pen.rectangle((x + 1, y + 1, x + CELL - 2, y + CELL - 2), fill=shade(COLOURS[colour]))
    image.save(file)


def question(colour: str, language: str) -> str:
    return f"How many {colour} squares?" if language == "en" else f"有几个{CHINESE[colour]}方块？"


def write_rows(folder: Path, num_rows: int, seed: int = 0, most: int = 4, text_rows: int = 0) -> Path:
    """`rows.jsonl` of `num_rows` rows about images beside it, and `text_rows` without one; each has `images` or none.

    most: squares of a colour in an image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draws, rows = random.Random(seed), []
    for number in range(num_rows):
        colour, language = draws.choice([*COLOURS]), draws.choice(("en", "zh"))
        count = draws.randint(0, most)
        other = next(name for name in COLOURS if name != colour)
        cells = [colour] * count + [draws.choice((other, None)) for _ in range(4 - count)]
        draws.shuffle(cells)
        name = f"{seed}-{number}.png"
        draw(folder / name, cells, draws)
        answer = NUMBERS[language][count]
        rows.append({"instruction": f"<image>\n{question(colour, language)}", "output": answer, "images": [name]})
    for number in range(text_rows):
        count = number % 4
        rows.append({"instruction": f"What comes after {NUMBERS['en'][count]}", "output": NUMBERS["en"][count + 1]})
    draws.shuffle(rows)
    file = folder / f"rows-{seed}.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file
