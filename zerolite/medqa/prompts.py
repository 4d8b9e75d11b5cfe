"""The prompt format, and a conversation as token ids and labels.

    <bos>{system}\n\n### Question:\n{question}\n\n### Answer:\n{answer}<eos>### Question:\n ...

Prompts and answers are tokenised apart, so that no merge crosses the border between what is given and what is
learned; a special token's name inside a text stays text. Loss is on each answer and its EOS. `CHAT_TEMPLATE` is the
same format for `tokenizer.apply_chat_template`: it goes with the exported model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from zerolite.medqa.data import Conversation

# A row of more is not tokenised whole: a tokeniser takes 200 bytes and 2 us a character, and cutoff_len drops the rest.
WHOLE_CHARACTERS = 1 << 17
CHARACTERS_A_TOKEN = 16  # of a part that is tokenised; where it gives too few tokens, a longer part is
CUT_TOKENS = 64  # so near to a cut, tokens may be others than those of the whole text

IGNORED = -100  # label of a position without loss, as in torch's cross_entropy

SYSTEM = "{}\n\n"
QUESTION = "### Question:\n{}\n\n### Answer:\n"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Question:\\n' + message['content'] + '\\n\\n### Answer:\\n' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Example:
    """One row as the model reads it. `labels[i]` is `input_ids[i]` where it is to be learned, else IGNORED."""

    input_ids: np.ndarray  # (length,) int32
    labels: np.ndarray  # (length,) int32

    @property
    def num_labels(self) -> int:
        """Positions with loss; the first position has none, since nothing predicts it."""
        return int((self.labels[1:] != IGNORED).sum())


def encode(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, cutoff_len: int
) -> tuple[list[Example], int]:
    """Examples of at most `cutoff_len` tokens, in the same order, and how many of them were shortened.

    Too long a row loses its oldest turns first, and the system text with the first of them. Then prompt and answer
    share `cutoff_len`, half to each where both are long: the prompt loses its beginning, the answer its end, but
    never its EOS.
    """
    is_long = [_num_characters(conversation) > WHOLE_CHARACTERS for conversation in conversations]
    whole = [conversation for conversation, long in zip(conversations, is_long, strict=True) if not long]
    ids = iter(_tokenize(texts(whole), tokenizer))
    examples, num_shortened = [], 0
    for conversation, long in zip(conversations, is_long, strict=True):
        if long:
            turns = _last_turns(conversation, tokenizer, cutoff_len)
        else:
            turns = [(next(ids), next(ids) + [tokenizer.eos_token_id]) for _ in conversation.turns]
        example, is_shortened = _join(turns, _bos(tokenizer), cutoff_len)
        examples.append(example)
        num_shortened += is_shortened
    return examples, num_shortened


def texts(conversations: list[Conversation]) -> list[str]:
    """What is tokenised: prompt, answer, prompt, answer ... of all turns of all conversations."""
    return [
        text
        for conversation in conversations
        for prompt, (_, answer) in zip(_prompts(conversation), conversation.turns, strict=True)
        for text in (prompt, answer)
    ]


def encode_prompt(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, room: int) -> list[int]:
    """Token ids that the answer to the first question is generated from: the last `room` of them at most."""
    ids = _tokenize_end(_prompts(conversation)[0], tokenizer, room)
    bos = _bos(tokenizer)
    return bos + ids[-(room - len(bos)) :]


def _prompts(conversation: Conversation) -> list[str]:
    prompts = [QUESTION.format(question) for question, _ in conversation.turns]
    if conversation.system:
        prompts[0] = SYSTEM.format(conversation.system) + prompts[0]
    return prompts


def _tokenize(strings: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not strings:
        return []
    encoded = tokenizer(strings, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    return encoded["input_ids"]


def _num_characters(conversation: Conversation) -> int:
    return len(conversation.system) + sum(len(question) + len(answer) for question, answer in conversation.turns)


def _last_turns(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, cutoff_len: int
) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer with EOS) of the last turns: of an absurdly long row, what `_join` makes the same example from.

    Of each text so much is tokenised that more than `cutoff_len` tokens are sure, since `_join` asks no more of its
    length than whether it is that long; and turns before those that fill `cutoff_len` would be dropped.
    """
    turns: list[tuple[list[int], list[int]]] = []
    length = 0
    for prompt, (_, text) in zip(reversed(_prompts(conversation)), reversed(conversation.turns), strict=True):
        answer = _tokenize_start(text, tokenizer, cutoff_len) + [tokenizer.eos_token_id]
        turns.insert(0, (_tokenize_end(prompt, tokenizer, cutoff_len), answer))
        length += len(turns[0][0]) + len(answer)
        if length > cutoff_len:
            break
    return turns


def _tokenize_start(text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[int]:
    """Token ids of `text`, of a long one the first `num_tokens` and some more, which may be others near the cut."""
    return _tokenize_part(text, tokenizer, num_tokens, lambda size: text[:size])


def _tokenize_end(text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[int]:
    """Token ids of `text`, of a long one the last `num_tokens` and some more, which may be others near the cut."""
    return _tokenize_part(text, tokenizer, num_tokens, lambda size: text[-size:])


def _tokenize_part(
    text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int, part: Callable[[int], str]
) -> list[int]:
    size = max(WHOLE_CHARACTERS, num_tokens * CHARACTERS_A_TOKEN)
    while size < len(text):
        (ids,) = _tokenize([part(size)], tokenizer)
        if len(ids) >= num_tokens + CUT_TOKENS:
            return ids
        size *= 2  # few tokens of many characters each
    (ids,) = _tokenize([text], tokenizer)
    return ids


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _join(turns: list[tuple[list[int], list[int]]], bos: list[int], cutoff_len: int) -> tuple[Example, bool]:
    room = cutoff_len - len(bos)
    length = sum(len(prompt) + len(answer) for prompt, answer in turns)
    is_shortened = length > room
    while length > room and len(turns) > 1:
        prompt, answer = turns.pop(0)
        length -= len(prompt) + len(answer)
    if length > room:
        prompt, answer = turns[0]
        prompt = prompt[-max(room - len(answer), room // 2) :]
        answer_room = room - len(prompt)
        if len(answer) > answer_room:
            answer = answer[: answer_room - 1] + answer[-1:]
        turns = [(prompt, answer)]
    input_ids, labels = list(bos), [IGNORED] * len(bos)
    for prompt, answer in turns:
        input_ids += prompt + answer
        labels += [IGNORED] * len(prompt) + answer
    return Example(np.array(input_ids, np.int32), np.array(labels, np.int32)), is_shortened
