"""A conversation as token ids and labels: what its rendered text gives, with loss on answers and what ends them.

What is asked is what was trained: both are tokenised from the chat template's text. A row that is too long is cut in
its texts, never in what the template writes around them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from zerolite.medqa.data import Conversation
from zerolite.medqa.images.files import ImageFile
from zerolite.medqa.images.sight import sight_of
from zerolite.medqa.template import template_of
from zerolite.medqa.tokens import IGNORED, Example, Tokens, tokenize, tokenize_all

__all__ = ["IGNORED", "Example", "Prompt", "encode", "first_prompt", "prompt_of", "tokens_within"]

# A row of more is not tokenised whole: a tokeniser takes 200 bytes and 2 us a character, and cutoff_len drops the rest.
WHOLE_CHARACTERS = 1 << 17
CHARACTERS_A_TOKEN = 16  # of a part that is tokenised; where it gives too few tokens, a longer part is
CUT_TOKENS = 64  # so near to a cut, tokens may be others than those of the whole text

T = TypeVar("T")


def encode(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, cutoff_len: int
) -> tuple[list[Example], int]:
    """Examples of at most `cutoff_len` tokens, in the same order, and how many of them were shortened.

    The ids are those of `tokenizer.apply_chat_template`. Too long a row loses its oldest turns first, then its system
    text. Then question and answer share `cutoff_len`, half to each where both are long: the question loses its
    beginning, the answer its end, but never the token that ends it. Raises ValueError for a row that the template or
    the tokenizer changes, and where `cutoff_len` has no room for the template.
    """
    template = template_of(tokenizer)
    rows = [_bounded(conversation, tokenizer, cutoff_len) for conversation in conversations]
    segments = [_named(row, lambda row=row: template.segments(row)) for row in rows]

    def tokens_of(row: Conversation) -> Tokens:
        return next(tokenize_all([template.segments(row)], template))

    examples, num_shortened = [], 0
    for given, row, tokens in zip(conversations, rows, tokenize_all(segments, template), strict=True):
        num_shortened += row != given or len(tokens.ids) > cutoff_len
        if len(tokens.ids) > cutoff_len:
            row, tokens = _named(row, lambda row=row, tokens=tokens: _shortened(row, tokens, tokens_of, cutoff_len, 1))
        example = _named(row, tokens.example)
        if row.images:
            example = replace(example, images=row.images, sight=sight_of(tokenizer))
        examples.append(example)
    return examples, num_shortened


def tokens_within(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, cutoff_len: int
) -> tuple[Conversation, Tokens]:
    """What of one row fits into `cutoff_len`, and its tokens, shortened and refused as `encode` does it."""
    template = template_of(tokenizer)

    def tokens_of(row: Conversation) -> Tokens:
        return _named(row, lambda: next(tokenize_all([template.segments(row)], template)))

    row = _bounded(conversation, tokenizer, cutoff_len)
    return _shortened(row, tokens_of(row), tokens_of, cutoff_len, is_answer_there=1)


def check_room(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, cutoff_len: int) -> None:
    """ValueError for a row with images that has no room in `cutoff_len`: no such row is cut."""
    template = template_of(tokenizer)
    tokens = next(tokenize_all([template.segments(conversation)], template))
    if len(tokens.ids) > cutoff_len:
        raise ValueError(_no_room(conversation, tokens, cutoff_len))


def _no_room(conversation: Conversation, tokens: Tokens, cutoff_len: int) -> str:
    spans = [(begin, end) for segment, begin, end in tokens.spans() if segment.slot and segment.slot[0] == "image"]
    of_images = sum(int(tokens.of(begin, end).sum()) for begin, end in spans)
    return (
        f"cutoff_len: {cutoff_len} tokens have no room for its {len(tokens.ids)}, of which {of_images} are of "
        f"{len(conversation.images)} images; rows with images are not cut"
    )


def _named(row: Conversation, make: Callable[[], T]) -> T:
    """What `make` gives; its ValueError with the row's beginning."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"row {row.turns[0][0][:60]!r}: {error}") from error


@dataclass(frozen=True)
class Prompt:
    """What the answer to a conversation's last question is generated from, and what had no room in it."""

    ids: list[int]
    num_turns_lost: int = 0
    is_system_lost: bool = False
    is_question_cut: bool = False
    images: tuple[ImageFile, ...] = ()  # that stand in it

    @property
    def loss(self) -> str:
        """What had no room, in words; "" where all is there."""
        turns = "turn" if self.num_turns_lost == 1 else f"{self.num_turns_lost} turns"
        lost = [f"the oldest {turns}"] if self.num_turns_lost else []
        lost += ["the system text"] if self.is_system_lost else []
        lost += ["the beginning of the question"] if self.is_question_cut else []
        return ", ".join(lost)


def first_prompt(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, cutoff_len: int) -> Prompt:
    """The prompt of the first question, shortened as `prompt_of` does it.

    At most half of `cutoff_len`, which the answer shares; more only where the template alone takes half, and with
    images, which are not cut.
    """
    first = conversation.part(0, 1)
    room = cutoff_len - 1
    if not conversation.images:
        shortest = prompt_of(replace(first, system="", turns=(("?", "?"),)), tokenizer, cutoff_len)
        room = min(room, max(cutoff_len // 2, len(shortest.ids)))
    return prompt_of(first, tokenizer, room)


def prompt_of(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, room: int) -> Prompt:
    """The prompt of the last question, whose answer does not count; `room` token ids at most.

    Too long a one loses what a row of training does: its oldest turns, then its system text, then the beginning of its
    question. Raises ValueError where the template or the tokenizer changes a text, and where `room` has none for the
    template.
    """
    template = template_of(tokenizer)

    def tokens_of(row: Conversation) -> Tokens:
        return _named(row, lambda: next(tokenize_all([template.prompt_segments(row)], template)))

    whole = replace(conversation, turns=(*conversation.turns[:-1], (conversation.turns[-1][0], "?")), trained=())
    row = _bounded(whole, tokenizer, room)
    row, tokens = _shortened(row, tokens_of(row), tokens_of, room, is_answer_there=0)
    return Prompt(
        tokens.ids.tolist(),
        num_turns_lost=len(whole.turns) - len(row.turns),
        is_system_lost=bool(whole.system.strip()) and not row.system,
        is_question_cut=row.turns[-1][0] != whole.turns[-1][0],
        images=row.images,
    )


def images_beside(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What a model is given beside `input_ids` (prompts, tokens): nothing where no prompt has an image."""
    images = [image for prompt in prompts for image in prompt.images]
    return sight_of(tokenizer).inputs(images, input_ids) if images else {}


# --- rows that are too long -----------------------------------------------------------------------------------------


def _bounded(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, cutoff_len: int) -> Conversation:
    """Of an absurdly long row so much that the same example comes of it, since `_shortened` drops all the rest.

    Of each text so much stays that more than `cutoff_len` tokens are sure; turns before those that fill it are left
    out.
    """
    texts = [conversation.system, *(text for turn in conversation.turns for text in turn)]
    if sum(map(len, texts)) <= WHOLE_CHARACTERS or conversation.images:
        return conversation
    turns, length = [], 0
    for question, answer in reversed(conversation.turns):
        question, num_question = _part(question, tokenizer, cutoff_len, lambda text, size: text[-size:])
        answer, num_answer = _part(answer, tokenizer, cutoff_len, lambda text, size: text[:size])
        turns.insert(0, (question, answer))
        length += num_question + num_answer
        if length > cutoff_len:
            break
    system, _ = _part(conversation.system, tokenizer, cutoff_len, lambda text, size: text[:size])
    return replace(conversation, turns=tuple(turns), system=system, trained=conversation.trained[-len(turns) :])


def _part(
    text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int, part: Callable[[str, int], str]
) -> tuple[str, int]:
    """(part, its tokens): of a long text one end of more than `num_tokens` tokens and some more."""
    size = max(WHOLE_CHARACTERS, num_tokens * CHARACTERS_A_TOKEN)
    while size < len(text):
        ((ids, _, _),) = tokenize([part(text, size)], tokenizer)
        if len(ids) >= num_tokens + CUT_TOKENS:
            return part(text, size), len(ids)
        size *= 2  # few tokens of many characters each
    ((ids, _, _),) = tokenize([text], tokenizer)
    return text, len(ids)


def _shortened(
    conversation: Conversation,
    tokens: Tokens,
    tokens_of: Callable[[Conversation], Tokens],
    cutoff_len: int,
    is_answer_there: int,
) -> tuple[Conversation, Tokens]:
    """What of a row fits into `cutoff_len`, and its tokens; `is_answer_there`: 0 for a prompt, which ends before it."""
    while (excess := len(tokens.ids) - cutoff_len) > 0 and len(conversation.turns) > 1:
        of_turns: dict[int, int] = {}  # where each begins, with its images
        for segment, begin, _ in tokens.spans():
            if segment.slot and segment.slot[0] in ("question", "image"):
                of_turns.setdefault(segment.slot[1], begin)
        begins = [*of_turns.values()]
        drop = 0
        while drop < len(begins) - 1 and excess > 0:
            excess -= int(tokens.of(begins[drop], begins[drop + 1]).sum())
            drop += 1
        conversation = conversation.part(drop)
        tokens = tokens_of(conversation)
    if len(tokens.ids) > cutoff_len and conversation.system:
        conversation = replace(conversation, system="")
        tokens = tokens_of(conversation)
    while (excess := len(tokens.ids) - cutoff_len) > 0:
        conversation = _cut(conversation, tokens, is_answer_there, excess, cutoff_len)
        tokens = tokens_of(conversation)
    return conversation, tokens


def _cut(conversation: Conversation, tokens: Tokens, is_answer_there: int, excess: int, room: int) -> Conversation:
    """A conversation of one turn with `excess` tokens less, of the longer one of its texts first."""
    if conversation.images:
        raise ValueError(_no_room(conversation, tokens, room))
    counts, spans, texts = {"question": 0, "answer": 0}, {}, {"answer": conversation.turns[0][1]}
    for segment, begin, end in tokens.spans():
        if segment.slot:
            spans[segment.slot[0]], texts[segment.slot[0]] = begin, segment.text
            counts[segment.slot[0]] = int(tokens.of(begin, end).sum())
    fixed = len(tokens.ids) - counts["question"] - counts["answer"]
    if room - fixed < 1 + is_answer_there:
        raise ValueError(f"cutoff_len: {room} tokens have no room for the chat template's own {fixed}")
    keep = len(tokens.ids) - excess - fixed
    keep_answer = min(counts["answer"], max(keep - counts["question"], keep // 2, 1)) if is_answer_there else 0
    keep_question = min(counts["question"], max(keep - keep_answer, 1))
    question, answer, question_begin = texts["question"], texts["answer"], spans["question"]
    if keep_question < counts["question"]:
        inside = np.flatnonzero(tokens.of(question_begin, question_begin + len(question)))
        cut = int(tokens.starts[inside[-keep_question]]) - question_begin
        question = question[max(cut, 1) :]
    if is_answer_there and keep_answer < counts["answer"]:
        begin = spans["answer"]
        inside = np.flatnonzero(tokens.of(begin, begin + len(answer)))
        cut = int(tokens.ends[inside[keep_answer - 1]]) - begin
        answer = answer[: min(cut, len(answer) - 1)]
    return replace(conversation, turns=((question, answer),))
