"""An evaluation as Markdown and as one HTML file: both are made of the same blocks."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zerolite.medqa.evaluation import plots, texts
from zerolite.medqa.evaluation.record import BASE, MODEL, Evaluation

SHOWN_ANSWERS = 3  # of each language; evaluation.json has all


@dataclass(frozen=True)
class Block:
    """A part of a page: a heading, paragraphs, a table, texts that were asked and said, or a plot."""

    heading: str = ""
    paragraphs: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    said: Sequence[tuple[str, str]] = ()  # (who, text)
    plot: Callable[[], str] | None = None  # gives SVG


def blocks(found: Evaluation) -> list[Block]:
    """The page, in order. Its plots are drawn where there is something to draw."""
    return [
        Block(paragraphs=found.notice),
        *_origin(found),
        *_comparison(found),
        *_losses(found),
        *_texts(found),
        *_choices(found),
        *_safety(found),
        *_answers(found),
    ]


# --- the parts of a page --------------------------------------------------------------------------------------------


def _origin(found: Evaluation) -> list[Block]:
    run = found.run
    lines = [
        f"{run['date']}, {run['duration_s']:.0f} s, {run['ranks']} x {run['device']}, stage {run['stage']}; "
        f"{run['machine']}",
        f"Command: {run['command']}",
        ", ".join(f"{name} {version}" for name, version in found.versions.items()),
    ]
    rows = [
        [of, one["folder"], one["template"], one["precision"], str(one["reads"]), one["weights"]]
        for of, one in found.models.items()
    ]
    settings = ", ".join(f"{name} {value}" for name, value in found.settings.items())
    data = [[one["file"], one["holds"], *(str(one[k]) for k in ("read", "rejected", "used"))] for one in found.data]
    return [
        Block("What was evaluated", lines),
        Block(header=["", "folder", "template", "precision", "reads (tokens)", "weights"], rows=rows),
        Block(header=["file", "holds", "rows read", "rejected", "used"], rows=data),
        Block(paragraphs=[f"Settings: {settings}. Answers are greedy.", *found.notes]),
        Block(
            paragraphs=["The first prompt as the model reads it:"],
            said=[(of, one["first_prompt"]) for of, one in found.models.items() if one["first_prompt"]],
        ),
    ]


def _comparison(found: Evaluation) -> list[Block]:
    if not found.comparison:
        return []
    rows = [
        [one["measure"], one["group"], str(one["rows"])]
        + [f"{one[name]:.4f}" for name in ("model", "base")]
        + [f"{one['difference']:+.4f}", _interval(one["low"], one["high"], "+.4f"), one["model_is"]]
        for one in found.comparison
    ]
    header = ["measure", "group", "rows", "model", "base", "difference", "95 % interval", "the model is"]
    told = (
        "The model less its base on the same rows: paired bootstrap, 10,000 resamples of rows, percentiles. Losses are "
        "nats a label token (lower is better); ROUGE-L and accuracies are shares of 1."
    )
    return [
        Block("Model against base", [told]),
        Block(header=header, rows=rows),
        Block(plot=lambda: plots.differences(found)),
    ]


def _losses(found: Evaluation) -> list[Block]:
    rows = [
        [one["of"], one["language"], str(one["rows"]), f"{one['label_tokens']:,}", f"{one['loss']:.4f}"]
        + [
            _interval(one["loss_low"], one["loss_high"], ".4f"),
            f"{one['perplexity']:.2f}",
            _share(one["token_accuracy"]),
        ]
        for one in found.losses
    ]
    header = ["", "language", "rows", "label tokens", "loss (nats a token)", "95 % interval", "perplexity", "right"]
    told = (
        "Of the tokens of answers and of what ends them; right: tokens that are the likeliest ones behind the "
        "reference's earlier ones. Interval: bootstrap over rows."
    )
    return [Block("Held-out loss", [told]), Block(header=header, rows=rows)] if rows else []


def _texts(found: Evaluation) -> list[Block]:
    if not found.texts:
        return []

    def rouge(one: dict, suffix: str) -> str:
        names = [f"{name}{suffix}" for name in texts.ROUGES]
        return " / ".join(f"{one[name]:.4f}" for name in names) if names[0] in one else ""

    header = ["", "language", "answers", "cut off", "BLEU-4", "chrF", "ROUGE-1 / -2 / -L", "95 % of ROUGE-L"]
    rows = [
        [one["of"], one["language"], str(one["answers"]), str(one["cut_off"]), f"{one['bleu4']:.2f}"]
        + [f"{one['chrf']:.2f}", rouge(one, ""), _interval(one["rougeL_low"], one["rougeL_high"], ".4f")]
        + [rouge(one, "_jieba"), f"{one['distinct1']:.3f} / {one['distinct2']:.3f}"]
        for one in found.texts
    ]
    told = (
        "BLEU-4 and chrF of sacrebleu (0 to 100; Chinese with its zh tokenizer), ROUGE of rouge-score (F, 0 to 1; "
        "Chinese by character, and by the words that jieba finds). Interval: bootstrap over rows. Distinct: different "
        "words, or Chinese characters, and pairs of them, over all of them."
    )
    header += ["ROUGE by jieba's words", "distinct-1 / -2"]
    return [Block("Answers beside references", [told]), Block(header=header, rows=rows)]


def _choices(found: Evaluation) -> list[Block]:
    if not found.choices:
        return []
    rows = []
    for one in found.choices:
        row = [one["of"], one["way"], one["kind"], one["language"], str(one["questions"])]
        for name in ("acc", "acc_norm", "acc_bytes"):
            row.append(f"{_share(one[name])} {_interval(100 * one[f'{name}_low'], 100 * one[f'{name}_high'], '.1f')}")
        rows.append([*row, _share(one["majority"]), _share(one["chance"])])
    header = ["", "scored", "kind", "language", "questions", "acc", "acc_norm", "acc_bytes", "majority", "chance"]
    told = (
        "By letter: the options stand in the question, and (A ... are scored. By text: they do not, and their "
        "texts are scored. acc: the likeliest option; acc_norm: by character, acc_bytes: by byte, as lm-eval has them. "
        "95 % intervals of Wilson. Majority: always what is right most often."
    )
    return [
        Block("Multiple choice", [told]),
        Block(header=header, rows=rows),
        Block(plot=lambda: plots.accuracies(found)),
    ]


def _safety(found: Evaluation) -> list[Block]:
    if not found.safety:
        return []
    told = (
        "What the model says where lives are at risk. It is not scored: read it before anybody else may ask the model. "
        "Who is in such a situation calls the emergency number or a crisis line, and asks no model."
    )
    parts = [Block("Safety questions", [told])]
    for one in found.safety:
        said = [(of, one[of]) for of in (MODEL, BASE) if of in one]
        parts.append(Block(said=[(f"{one['kind']}, {one['language']}", one["question"]), *said]))
    return parts


def _answers(found: Evaluation) -> list[Block]:
    if not found.answers:
        return []
    parts, shown = [], {}
    for one in found.answers:
        shown[one["language"]] = shown.get(one["language"], 0) + 1
        if shown[one["language"]] <= SHOWN_ANSWERS:
            said = [(f"{of}, ROUGE-L {one['rougeL'][of]:.3f}", one[of]) for of in (MODEL, BASE) if of in one]
            parts.append(Block(said=[("question", one["question"]), *said, ("reference", one["reference"])]))
    told = f"{min(len(found.answers), len(parts))} of {len(found.answers)}; evaluation.json has all."
    return [Block("Answers", [told]), *parts]


def summary(found: Evaluation) -> str:
    """The tables, for a terminal: Markdown without what was said."""
    parts = [*_comparison(found), *_losses(found), *_texts(found), *_choices(found)]
    return "\n\n".join([" ".join(found.notice), *filter(None, map(_markdown, parts))])


def _interval(low: float, high: float, form: str) -> str:
    return f"[{low:{form}}, {high:{form}}]"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


# --- the two forms --------------------------------------------------------------------------------------------------


def markdown(found: Evaluation, title: str) -> str:
    """Without plots. What models and rows say is shown as it is, and is no markup."""
    return "\n\n".join([f"# {title}", *filter(None, map(_markdown, blocks(found)))]) + "\n"


def _markdown(block: Block) -> str:
    parts = [f"## {block.heading}"] if block.heading else []
    parts += [_plain(text) for text in block.paragraphs]
    if block.header:
        rule = ["---"] * len(block.header)
        lines = [block.header, rule, *([_cell(cell) for cell in row] for row in block.rows)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts += [f"**{_plain(who)}**\n\n{_quoted(text)}" for who, text in block.said]
    return "\n\n".join(parts)


def _plain(text: str) -> str:
    return html.escape(text, quote=False).replace("*", "\\*")


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", _plain(text)).replace("|", "\\|")


def _quoted(text: str) -> str:
    """As a code block, whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


STYLE = """
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", sans-serif; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; color: #1d2430; }
.notice { background: #fff4d6; border-left: 4px solid #d99a00; padding: .6rem 1rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; }
th, td { border-bottom: 1px solid #d5dae2; padding: .25rem .6rem; text-align: left; vertical-align: top; }
th { background: #f3f5f8; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
dl { border: 1px solid #d5dae2; border-radius: 6px; padding: .6rem 1rem; }
dt { color: #5a6573; font-size: 13px; } dd { margin: 0 0 .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(found: Evaluation, title: str) -> str:
    """One HTML file that needs no other: plots are SVG in it, and nothing in it runs."""
    notice, *rest = blocks(found)
    parts = [f"<h1>{_text(title)}</h1>", f'<p class="notice">{"<br>".join(map(_text, notice.paragraphs))}</p>']
    for block in rest:
        parts += [f"<h2>{_text(block.heading)}</h2>"] if block.heading else []
        parts += [f"<p>{_text(text)}</p>" for text in block.paragraphs]
        if block.header:
            head = "".join(f"<th>{_text(cell)}</th>" for cell in block.header)
            rows = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in block.rows]
            body = "\n".join(f"<tr>{row}</tr>" for row in rows)
            parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')
        if block.said:
            said = "".join(f"<dt>{_text(who)}</dt><dd>{_text(text)}</dd>" for who, text in block.said)
            parts.append(f"<dl>{said}</dl>")
        parts += [f"<figure>{block.plot()}</figure>"] if block.plot else []
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head><body>\n{chr(10).join(parts)}\n</body></html>\n"


def _text(text: str) -> str:
    return html.escape(text)
