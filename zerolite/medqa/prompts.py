"""The prompt format, and a conversation as token ids and labels.

    <bos>{system}\n\n### Question:\n{question}\n\n### Answer:\n{answer}<eos>### Question:\n ...

Prompts and answers are tokenised apart, so that no merge crosses the border between what is given and what is
learned; a special token's name inside a text stays text. Loss is on each answer and its EOS. `CHAT_TEMPLATE` is the
same format for `tokenizer.apply_chat_template`: it goes with the exported model.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from zerolite.medqa.data import Conversation

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
    ids = iter(_tokenize(texts(conversations), tokenizer))
    examples, num_shortened = [], 0
    for conversation in conversations:
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
    (ids,) = _tokenize(_prompts(conversation)[:1], tokenizer)
    bos = _bos(tokenizer)
    return bos + ids[-(room - len(bos)) :]


def _prompts(conversation: Conversation) -> list[str]:
    prompts = [QUESTION.format(question) for question, _ in conversation.turns]
    if conversation.system:
        prompts[0] = SYSTEM.format(conversation.system) + prompts[0]
    return prompts


def _tokenize(strings: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded = tokenizer(strings, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    return encoded["input_ids"]


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
