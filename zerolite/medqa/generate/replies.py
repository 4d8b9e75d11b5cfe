"""What an answer of the endpoint holds: items, or the reason why there are none.

JSON that does not parse is repaired, and then it must still end in `"complete": true`: a text that was cut off would
otherwise be closed by the repair and look whole.
"""

import json
import re
from dataclasses import dataclass

from zerolite.medqa.generate.journal import Answer
from zerolite.medqa.generate.plan import Request
from zerolite.medqa.rows import Conversation, text
from zerolite.medqa.similar import tokens_of

CUT_OFF = "cut off by the endpoint"
REFUSED = "a refusal"
MALFORMED = "malformed: no JSON object with items"
HOLDS_KEY = "held the key of the endpoint"
MALFORMED_ITEM = "malformed: an item without its texts"
NO_EVIDENCE = "evidence is not in the passage"
LEAST_EVIDENCE = 4  # tokens


@dataclass(frozen=True)
class Item:
    """One question and answer, or dialogue, of an answer; or why it is none."""

    number: int  # in its answer, from 1
    conversation: Conversation | None
    reason: str = ""


def items(request: Request, answer: Answer) -> list[Item] | str:
    """The items of an answer; the reason where it has none."""
    value = _object(answer)
    if isinstance(value, str):
        return value
    found = value.get("items")
    if not isinstance(found, list) or not found:
        return MALFORMED
    return [_item(request, number, one) for number, one in enumerate(found, start=1)]


def supported(answer: Answer, count: int) -> list[bool] | None:
    """Which of `count` answers a check found in the passage; None where it does not say so of each."""
    value = _object(answer)
    found = value.get("supported") if isinstance(value, dict) else None
    if not isinstance(found, list) or len(found) != count or not all(isinstance(one, bool) for one in found):
        return None
    return found


def _object(answer: Answer) -> dict | str:
    import json_repair

    if answer.finish in ("refusal", "content_filter"):
        return REFUSED
    if answer.finish == "key":
        return HOLDS_KEY
    if answer.finish == "length":
        return CUT_OFF
    content = re.sub(r"\A\s*<think>.*?</think>", "", answer.text, flags=re.DOTALL).strip()
    content = re.sub(r"\A```\w*\s*\n(.*?)(\n```)?\Z", r"\1", content, flags=re.DOTALL)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        if "{" not in content:
            return REFUSED if is_refusal(content) else MALFORMED
        try:
            value = json_repair.loads(content[content.index("{") :])
        except (ValueError, RecursionError):
            return MALFORMED
        value = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        if isinstance(value, dict) and value.get("complete") is not True:
            return CUT_OFF
    return value if isinstance(value, dict) else MALFORMED


def _item(request: Request, number: int, value: object) -> Item:
    try:
        if not isinstance(value, dict):
            raise ValueError
        if request.kind == "dialogue":
            turns = value["turns"]
            if not isinstance(turns, list) or not turns:
                raise ValueError
            pairs = [(text(turn["patient"], ""), text(turn["doctor"], "")) for turn in turns]
        else:
            pairs = [(text(value["question"], ""), text(value["answer"], ""))]
        if request.passage is not None and not _is_in(text(value["evidence"], ""), request.passage.text):
            return Item(number, None, NO_EVIDENCE)
    except (ValueError, TypeError, KeyError):
        return Item(number, None, MALFORMED_ITEM)
    return Item(number, Conversation(tuple(pairs)))


def _is_in(evidence: str, passage: str) -> bool:
    """Whether a sentence stands in a passage, but for case, width and punctuation."""
    wanted = tokens_of(evidence)
    return len(wanted) >= LEAST_EVIDENCE and f" {' '.join(wanted)} " in f" {' '.join(tokens_of(passage))} "


_CANNOT = r"(?:can(?:no|')t|cannot|can not|won't|unable to|not able to)"
_TASK = r"(?:help|assist|provide|answer|comply|fulfil|generate|create|give (?:you )?medical)"
_REFUSALS = re.compile(
    "|".join(
        (
            r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b",
            r"\bi(?:'m| am) (?:an ai|a (?:large )?language model)\b",
            rf"\bi (?:am )?(?:must decline to|{_CANNOT}) {_TASK}",
            rf"\bi'm {_CANNOT} {_TASK}",
            rf"\bi(?:'m| am) (?:very |so )?sorry,? but\b.{{0,40}}\b{_CANNOT}\b",
            r"(?:抱歉|对不起|很遗憾).{0,16}(?:无法|不能|没办法|没法)",
            r"作为(?:一个|一名|一款)?(?:ai|人工智能|语言模型|大模型)",
            r"我(?:是|只是)(?:一个|一名|一款)?(?:ai|人工智能|语言模型)",
            r"我(?:无法|不能|没办法)(?:回答|提供|协助|帮助|满足|完成|生成)",
        )
    ),
    re.IGNORECASE | re.DOTALL,
)


def is_refusal(answer: str) -> bool:
    """Whether an answer begins by refusing to answer, in English or Chinese."""
    return _REFUSALS.search(answer[:300].replace("\u2019", "'")) is not None
