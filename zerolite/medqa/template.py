"""The chat template: how messages become one text, and which part of that text an answer is learned from.

One template serves training, evaluation and asking, and is written beside the result: the model's own where it has one,
else this project's, or one that `--template` names. A template is code that renders messages; what is learned is found
by rendering placeholders: from where the prompt ends that generation starts from, to the token that ends the answer.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from zerolite.medqa.data import Conversation
from zerolite.medqa.images.sight import sight_of
from zerolite.medqa.rows import PLACE

QUESTION = "### Question:\n{}\n\n### Answer:\n"
ZEROLITE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Question:\\n' + message['content'] + '\\n\\n### Answer:\\n' }}"
    "{% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
# The prompt of Stanford Alpaca, its form without an input.
ALPACA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}"
    "{% endif %}{{ '\\n\\n' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endif %}{% endfor %}"
)
OWN = "own"
NAMED = {"zerolite": ZEROLITE, "alpaca": ALPACA}


@dataclass(frozen=True)
class Segment:
    """A part of a rendered text: the template's, or a text of the row (`slot`: which one)."""

    text: str
    is_learned: bool = False
    slot: tuple[str, int] | None = None  # ("system" | "question" | "image" | "answer", turn)

    @property
    def is_text(self) -> bool:
        """Whether it is a text of the row, in which no special token is one."""
        return self.slot is not None and self.slot[0] != "image"


@dataclass(frozen=True)
class ImageMark:
    """What a template writes for an image in a question."""

    text: str
    is_written: bool  # by the template, which takes the parts of a message; else it is the image token, as text
    keeps_order: bool  # else it writes images before the text


class Template:
    """What a tokenizer's chat template makes of conversations.

    Raises ValueError where the template cannot be trained with: it fails, leaves a text out, or its prompt is not the
    beginning of its dialogue.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.special = re.compile("|".join(map(re.escape, special_names(tokenizer))) or "(?!)")
        self._skeletons: dict[tuple[int, bool], list[Segment]] = {}
        self._marks: dict[str, ImageMark] = {}
        self.takes_parts = False
        try:
            self._find_system()
        except ValueError:
            self.takes_parts = True  # as LLaVA's, which finds no text in a message whose content is one
            try:
                self._find_system()
            except ValueError:
                self.takes_parts = False
                self._find_system()

    def _find_system(self) -> None:
        try:
            self._skeleton(1, True)
            self.has_system = True
        except ValueError:  # as Gemma's and Mistral's first ones: a system text then begins the first question
            self.has_system = False
        self.skeleton(2, self.has_system)

    def messages(self, conversation: Conversation) -> list[dict[str, str]]:
        """As `apply_chat_template` takes them, without the space around texts, which many templates take off."""
        system, messages = conversation.system.strip(), []
        if system and self.has_system:
            messages.append({"role": "system", "content": system})
        for index, (question, answer) in enumerate(conversation.turns):
            if system and not self.has_system and index == 0:
                question = f"{system}\n\n{question}"
            messages += [
                {"role": "user", "content": question.strip()},
                {"role": "assistant", "content": answer.strip()},
            ]
        return messages

    def render(self, messages: Sequence[Mapping[str, Any]], is_prompt: bool = False) -> str:
        if self.takes_parts:
            messages = [
                one if isinstance(one["content"], list) else {**one, "content": [_text_part(one["content"])]}
                for one in messages
            ]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from error

    def segments(self, conversation: Conversation) -> list[Segment]:
        """The rendered dialogue in parts. ValueError where the template changes a text of it."""
        messages = self.messages(conversation)
        texts = iter(message["content"] for message in messages)
        skeleton = self.skeleton(len(conversation.turns), self.has_system and bool(conversation.system.strip()))
        segments = [
            segment if segment.slot is None else Segment(next(texts), segment.is_learned, segment.slot)
            for segment in skeleton
        ]
        if conversation.images:
            return self._with_images(messages, segments, conversation)
        if "".join(segment.text for segment in segments) != self.render(messages):
            raise ValueError("the chat template changes the texts of this row (--template zerolite takes any text)")
        return segments if not conversation.trained else _without_loss(segments, conversation)

    def _with_images(
        self, messages: list[dict[str, str]], segments: list[Segment], conversation: Conversation
    ) -> list[Segment]:
        """The segments with what is written for images between the texts of questions, a token for each of theirs."""
        sight = sight_of(self.tokenizer)
        mark, images, found, parts = self.image_mark(sight.token), iter(conversation.images), [], []
        for segment in segments:
            if segment.slot is None or segment.slot[0] != "question":
                found.append(segment)
                continue
            pieces, turn = segment.text.split(PLACE), segment.slot[1]
            if not mark.keeps_order:
                pieces = [*[""] * (len(pieces) - 1), "".join(pieces).strip()]
            content: list[dict] = [{"type": "image"}] * (2 * len(pieces) - 1)
            content[::2] = map(_text_part, pieces)
            by_hand = mark.text.join(pieces)
            parts.append([part for part in content if part.get("text") != ""] if mark.is_written else by_hand)
            for number, piece in enumerate(pieces):
                found += [Segment(mark.text, slot=("image", turn))] if number else []
                found += [Segment(piece, slot=segment.slot)] if piece else []
        given = iter(parts)
        asked = [{**one, "content": next(given)} if one["role"] == "user" else one for one in messages]
        if "".join(segment.text for segment in found) != self.render(asked):
            raise ValueError("the chat template changes the texts of this row (--template zerolite takes any text)")
        found = [
            Segment(mark.text.replace(sight.token, sight.token * sight.num_tokens(next(images))), slot=segment.slot)
            if segment.slot and segment.slot[0] == "image"
            else segment
            for segment in found
        ]
        return found if not conversation.trained else _without_loss(found, conversation)

    def image_mark(self, token: str) -> ImageMark:
        """What the template writes for an image that `token` stands for."""
        if token not in self._marks:
            self._marks[token] = self._image_mark(token)
        return self._marks[token]

    def _image_mark(self, token: str) -> ImageMark:
        before, after = _text_part("zqbeforeqz"), _text_part("zqafterqz")
        by_hand = ImageMark(token, is_written=False, keeps_order=True)
        try:
            plain, first, between = (
                self.render([{"role": "user", "content": content}])
                for content in ([after], [{"type": "image"}, after], [before, {"type": "image"}, after])
            )
        except ValueError:  # it takes texts alone
            return by_hand
        begin = len(os.path.commonprefix([plain, first]))
        text, rest = first[begin : len(first) - len(plain) + begin], plain[begin:]
        if token not in text or not first.endswith(rest):
            return by_hand
        return ImageMark(text, is_written=True, keeps_order=f"{before['text']}{text}{after['text']}" in between)

    def prompt_segments(self, conversation: Conversation) -> list[Segment]:
        """What the last answer is generated from."""
        segments = self.segments(conversation)
        last = next(index for index, s in enumerate(segments) if s.slot == ("question", len(conversation.turns) - 1))
        learned = next(index for index in range(last, len(segments)) if segments[index].is_learned)
        return segments[:learned]

    def skeleton(self, num_turns: int, has_system: bool) -> list[Segment]:
        """Segments with placeholders as texts; what the template writes around them is the same for every row."""
        key = num_turns, has_system
        if key not in self._skeletons:
            self._skeletons[key] = self._skeleton(*key)
        return self._skeletons[key]

    def _skeleton(self, num_turns: int, has_system: bool) -> list[Segment]:
        slots = [("system", 0)] if has_system else []
        slots += [(kind, turn) for turn in range(num_turns) for kind in ("question", "answer")]
        roles = {"system": "system", "question": "user", "answer": "assistant"}
        names = [f"zq{kind}{turn}qz" for kind, turn in slots]
        messages = [{"role": roles[kind], "content": name} for (kind, _), name in zip(slots, names, strict=True)]
        whole = self.render(messages)
        found = [piece for piece in re.split("(" + "|".join(map(re.escape, names)) + ")", whole)]
        if found[1::2] != names:
            raise ValueError("the chat template leaves out or repeats a text, or changes their order")
        segments, end = [Segment(found[0])], len(found[0])
        for index, slot in enumerate(slots):
            name, after = found[2 * index + 1 : 2 * index + 3]
            end += len(name)
            is_answer = slot[0] == "answer"
            segments.append(Segment(name, is_answer, slot))
            if is_answer:
                ending = self.special.match(after, len(after) - len(after.lstrip()))
                cut = ending.end() if ending else 0
                segments += [Segment(after[:cut], True), Segment(after[cut:])]
            if index + 1 < len(slots) and slots[index + 1][0] == "answer":  # `after` lies between question and answer
                cut = self._prompt_length(messages[: index + 1], whole) - end
                if not 0 <= cut <= len(after):
                    raise ValueError("the chat template's prompt does not end where its answer begins")
                segments += [Segment(after[:cut]), Segment(after[cut:], True)]
            elif not is_answer:
                segments.append(Segment(after))
            end += len(after)
        return [segment for segment in segments if segment.text]

    def _prompt_length(self, messages: list[dict[str, str]], whole: str) -> int:
        prompt = self.render(messages, is_prompt=True)
        if not whole.startswith(prompt):
            raise ValueError("the chat template's prompt is not the beginning of its dialogue")
        return len(prompt)

    @functools.cached_property
    def answer_ends(self) -> list[str]:
        """What ends the answers of a dialogue of two turns, with the end token; "" where nothing does."""
        segments, ends = self.skeleton(2, False), []
        for index, segment in enumerate(segments):
            if segment.slot and segment.slot[0] == "answer":
                after = segments[index + 1] if index + 1 < len(segments) else Segment("")
                ends.append(after.text if after.is_learned else "")
        return ends

    @property
    def end_token_id(self) -> int:
        """The special token that ends the last answer, which generation stops at."""
        names = self.special.findall(self.answer_ends[-1])
        return self.tokenizer.convert_tokens_to_ids(names[-1]) if names else self.tokenizer.eos_token_id


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _without_loss(segments: list[Segment], conversation: Conversation) -> list[Segment]:
    """Nothing is learned from the question on of a turn whose answer has no loss to the next question."""
    found, turn = [], 0
    for segment in segments:
        turn = segment.slot[1] if segment.slot and segment.slot[0] != "system" else turn
        is_learned = segment.is_learned and conversation.has_loss(turn)
        found.append(Segment(segment.text, is_learned, segment.slot))
    return found


@functools.lru_cache(maxsize=4)
def _template_of(tokenizer: PreTrainedTokenizerBase, text: str) -> Template:
    return Template(tokenizer)


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The tokenizer's template, this project's where it has none."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = ZEROLITE
    return _template_of(tokenizer, str(tokenizer.chat_template))


def special_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that the tokenizer reads as one special token each, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return sorted(names, key=len, reverse=True)


# --- choosing one ---------------------------------------------------------------------------------------------------


def choose(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> str:
    """Give the tokenizer the template that training, evaluation and asking use; what to tell about it.

    wanted: "own", "zerolite", "alpaca", a file of Jinja text, or None: its own one where there is one, else
    zerolite's. An own template is kept, with marks around the answers (`{% generation %}`, which trl and others read)
    and, where it does not end the last answer, the EOS token: in both cases only where that changes nothing else.
    Raises ValueError where the template is not there or cannot be trained with.
    """
    own = tokenizer.chat_template
    name = wanted or (OWN if own else "zerolite")
    if name == OWN and not own:
        raise ValueError("--template own: the tokenizer has no chat template; name zerolite, alpaca or a file")
    if name not in (OWN, *NAMED) and not Path(name).is_file():
        raise ValueError(
            f"--template {name}: expected own, zerolite, alpaca or a file of a Jinja template, got neither"
        )
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()))
    text = own if name == OWN else NAMED.get(name) or Path(name).read_text(encoding="utf-8")
    tokenizer.chat_template = text
    try:
        plain = template_of(tokenizer)
        told = "the model's own" if name == OWN else name
        if not plain.answer_ends[-1]:
            tokenizer.chat_template = text = _ended(text)
            plain = template_of(tokenizer)
            told += ", with the EOS token after the last answer, which it left open"
        marked = _marked(tokenizer, text, plain)
        if marked != text:
            tokenizer.chat_template = marked
            told += ", with marks around the answers"
        template_of(tokenizer)
    except ValueError as error:
        tokenizer.chat_template = own
        raise ValueError(f"--template {name}: {error}; --template zerolite takes any tokenizer") from error
    return f"chat template: {told}"


def _ended(text: str) -> str:
    return text.removesuffix("\n") + (
        "{% if not add_generation_prompt and messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    )


def _marked(tokenizer: PreTrainedTokenizerBase, text: str, plain: Template) -> str:
    """The template with generation marks around what is learned; `text` itself where it has them or they do not fit.

    The rendered dialogue is walked once more: each answer lies behind the text that ends a prompt and reaches to the
    end token.
    """
    starts, ends = set(), set(plain.answer_ends)
    segments = plain.skeleton(2, False)
    for before, segment in zip(segments, segments[1:], strict=False):
        if segment.is_learned and not before.is_learned and before.slot is None:
            starts.add(before.text)
    if re.search(r"{%-?\s*generation", text) or len(starts) != 1 or len(ends) != 1:
        return text
    start, end = (json.dumps(one, ensure_ascii=False) for one in (*starts, *ends))
    marked = (
        f"{{% set rendered %}}{text.removesuffix(chr(10))}{{% endset %}}"
        "{%- set rest = namespace(text=rendered) -%}{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}"
        f"{{%- set before = rest.text.partition({start}) -%}}{{%- set answer = before[2].partition({end}) -%}}"
        "{{- before[0] + before[1] -}}{%- generation -%}{{- answer[0] + answer[1] -}}{%- endgeneration -%}"
        "{%- set rest.text = answer[2] -%}{%- endif -%}{%- endfor -%}{{- rest.text -}}"
    )
    try:
        tokenizer.chat_template = marked
        there = template_of(tokenizer)
        for num_turns, has_system in ((1, False), (2, plain.has_system), (3, False)):
            if there.skeleton(num_turns, has_system) != plain.skeleton(num_turns, has_system):
                return text
    except ValueError:
        return text
    finally:
        tokenizer.chat_template = text
    return marked
