"""Pictures of coloured shapes with prompts in English and Chinese, and a judge that says what a picture shows."""

import re
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[str, str]  # a colour and a shape
SIZE = 32  # pixels along each side
COLOURS = {
    "red": (0.86, 0.12, 0.14), "green": (0.10, 0.62, 0.22), "blue": (0.12, 0.28, 0.86), "yellow": (0.96, 0.80, 0.08),
    "purple": (0.56, 0.14, 0.66),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色",
    "circle": "圆", "square": "正方形", "triangle": "三角形", "cross": "十字",
}  # fmt: skip
WORDS = ("a", *COLOURS, *SHAPES, "的", *CHINESE.values())
LENGTH = 3  # words of every prompt: "a red circle", "红色的圆"


def prompt_of(pair: Pair, is_chinese: bool = False) -> str:
    colour, shape = pair
    return f"{CHINESE[colour]}的{CHINESE[shape]}" if is_chinese else f"a {colour} {shape}"


def encode(prompts: list[str]) -> Tensor:
    """Words as one-hot rows: (prompts, LENGTH, words), zeros for the empty prompt. ValueError for other words.

    The model's first linear layer over captions is then a table of embeddings that trains with it.
    """
    one_hot = torch.zeros(len(prompts), LENGTH, len(WORDS))
    for row, prompt in enumerate(prompts):
        words = re.findall("|".join(sorted(WORDS, key=len, reverse=True)), prompt)
        if prompt and ("".join(words) != prompt.replace(" ", "") or len(words) != LENGTH):
            raise ValueError(
                f"a prompt is like 'a red circle' or '红色的圆', got {prompt!r}; words: {', '.join(WORDS)}"
            )
        for place, word in enumerate(words):
            one_hot[row, place, WORDS.index(word)] = 1.0
    return one_hot


def outlines(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Every shape with its centre at x, y: (shapes, rows, SIZE, SIZE), each pixel's covered share in quarters.

    x, y, radius: (rows,), in pixels.
    """
    pixels = (torch.arange(2 * SIZE, dtype=x.dtype) + 0.5) / 2
    dx, dy, r = pixels - x[:, None, None], pixels[:, None] - y[:, None, None], radius[:, None, None]
    far, near = torch.maximum(dx.abs(), dy.abs()), torch.minimum(dx.abs(), dy.abs())
    circle = (dx**2 + dy**2 < r**2).expand(len(x), -1, -1)
    triangle = (dy < 0.8 * r) & (2 * dx.abs() < 1.15 * (dy + r))
    masks = torch.stack([circle, far < 0.85 * r, triangle, (far < r) & (near < 0.32 * r)])
    return F.avg_pool2d(masks.to(x.dtype), 2)


def draw(pairs: list[Pair], generator: torch.Generator) -> Tensor:
    """A picture each, (rows, 3, SIZE, SIZE) in -1 to 1: place, size and the pale background are drawn at random."""
    rows = len(pairs)
    x, y = 14 + 4 * torch.rand(2, rows, generator=generator)
    every = outlines(x, y, 8.5 + 2.5 * torch.rand(rows, generator=generator))
    mask = every[[SHAPES.index(shape) for _, shape in pairs], range(rows)][:, None]
    background = 0.8 + 0.2 * torch.rand(rows, 1, 1, 1, generator=generator)
    ink = torch.tensor([COLOURS[colour] for colour, _ in pairs])[:, :, None, None]
    return 2 * (mask * ink + (1 - mask) * background) - 1


@cache
def _templates() -> Tensor:
    """Every shape at many places and sizes: (shapes, variants, pixels)."""
    x, y, radius = torch.meshgrid(*[torch.arange(11.0, 21.5)] * 2, torch.arange(6.0, 12.0, 0.5), indexing="ij")
    return outlines(x.flatten(), y.flatten(), radius.flatten()).flatten(2).float()


def judge(pictures: Tensor) -> list[Pair]:
    """The colour and shape that each picture shows, as far as rules can tell.

    The shape is the one whose outline at some place overlaps best with what differs from the border (intersection
    over union); the colour is the nearest to the mean of that.
    """
    pictures = (pictures.float().cpu().clamp(-1, 1) + 1) / 2
    border = torch.cat([pictures[:, :, 0], pictures[:, :, -1], pictures[:, :, :, 0], pictures[:, :, :, -1]], -1)
    differs = (pictures - border.median(-1).values[:, :, None, None]).abs().amax(1) > 0.25
    mask = differs.flatten(1).float()
    overlap = torch.einsum("svp,rp->srv", _templates(), mask)
    union = _templates().sum(-1)[:, None] + mask.sum(-1)[None, :, None] - overlap
    shapes = (overlap / union).amax(-1).argmax(0)
    ink = (pictures.flatten(2) * mask[:, None]).sum(-1) / mask.sum(-1, keepdim=True).clamp(min=1)
    colours = torch.cdist(ink, torch.tensor([*COLOURS.values()], dtype=torch.float32)).argmin(-1)
    return [([*COLOURS][colour], SHAPES[shape]) for colour, shape in zip(colours, shapes, strict=True)]


def share(pictures: Tensor, pairs: list[Pair]) -> str:
    """In how many pictures the judge sees the colour and the shape that were asked for."""
    seen = judge(pictures)
    colours, shapes = ([a[part] == b[part] for a, b in zip(seen, pairs, strict=True)] for part in (0, 1))
    return f"colour right in {sum(colours)} of {len(pairs)}, shape in {sum(shapes)} of {len(pairs)}"


def sheet(sections: dict[str, tuple[list[Pair], Tensor]], path: Path, columns: int = 8) -> None:
    """Write a PNG of every section's pictures with what was asked for above each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {title: -(-len(pairs) // columns) for title, (pairs, _) in sections.items()}
    figure, axes = pyplot.subplots(sum(rows.values()), columns, figsize=(1.1 * columns, 1.5 * sum(rows.values())))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.95, wspace=0.05, hspace=0.45)
    for place in axes.flat:
        place.axis("off")
    first = 0
    for title, (pairs, pictures) in sections.items():
        axes[first, 0].text(0, 1.25, title, fontsize=10, weight="bold", transform=axes[first, 0].transAxes)
        for place, pair, picture in zip(axes[first:].flat, pairs, pictures, strict=False):
            place.imshow(
                (picture.float().cpu().clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy(), interpolation="nearest"
            )
            place.set_title(" ".join(pair), fontsize=8, pad=3)
        first += rows[title]
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=65)
    pyplot.close(figure)
