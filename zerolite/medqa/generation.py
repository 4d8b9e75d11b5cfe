"""Answers of a model: one as it comes, or many questions at once; greedy unless a temperature is asked for."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from zerolite.medqa.answers import text_of
from zerolite.medqa.data import Conversation
from zerolite.medqa.model import SAMPLING
from zerolite.medqa.opening import Opened
from zerolite.medqa.prompts import Prompt, images_beside, prompt_of
from zerolite.medqa.template import template_of

MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Settings:
    """How answers are generated."""

    temperature: float = 0.0  # 0: greedy
    max_new_tokens: int | None = None  # None: MAX_NEW_TOKENS, half of what a smaller model reads

    def longest(self, room: int) -> int:
        """Token ids of an answer; ValueError where it leaves none of `room` to the question."""
        if self.max_new_tokens is None:
            return min(MAX_NEW_TOKENS, room // 2)
        if self.max_new_tokens >= room:
            raise ValueError(
                f"--max_new_tokens {self.max_new_tokens}: this model reads {room} tokens, question and answer together"
            )
        return self.max_new_tokens


@dataclass(frozen=True)
class Reply:
    """An answer to a prompt."""

    text: str
    is_cut: bool  # max_new_tokens ended it, not the model; the text says so at its end
    prompt: Prompt


class Stream(BaseStreamer):
    """Gives `write` the answer's text as it comes; what it gave in all is the text of the whole answer.

    A text is given once no later token changes it: a character may be several tokens, and white space at the end is
    none of the answer's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        self.tokenizer = tokenizer
        self.write = write
        self.ids: list[int] = []
        self.given = ""
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:  # transformers gives it first
            self.is_prompt = False
            return
        self.ids += value.flatten().tolist()
        self._give(self.tokenizer.decode(self.ids, skip_special_tokens=True).strip().rstrip("\ufffd").rstrip())

    def end(self) -> None:
        """Of transformers; the last part comes by `finish`, which knows whether the answer was cut off."""

    def finish(self, text: str) -> None:
        self._give(text)

    def _give(self, text: str) -> None:
        if len(text) > len(self.given) and text.startswith(self.given):
            self.write(text[len(self.given) :])
            self.given = text


def end_ids(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> list[int]:
    """What ends an answer: of the template, of the tokenizer and of the model's generation config."""
    there = model.generation_config.eos_token_id
    there = there if isinstance(there, list) else [there]
    ends = [template_of(tokenizer).end_token_id, tokenizer.eos_token_id, *there]
    return list(dict.fromkeys(end for end in ends if end is not None))


def reply(
    opened: Opened, conversation: Conversation, settings: Settings, write: Callable[[str], None] | None = None
) -> Reply:
    """The answer to the last question; `write` is given its text as it comes."""
    stream = None if write is None else Stream(opened.tokenizer, write)
    (found,) = replies(opened, [conversation], settings, stream)
    if stream is not None:
        stream.finish(found.text)
    return found


def replies(
    opened: Opened, conversations: Sequence[Conversation], settings: Settings, stream: Stream | None = None
) -> list[Reply]:
    """Answers to the last questions, in one batch with padding on the left; greedy ones are those of one by one."""
    tokenizer, longest = opened.tokenizer, settings.longest(opened.room)
    prompts = [prompt_of(one, tokenizer, opened.room - longest) for one in conversations]
    width, ends = max(len(prompt.ids) for prompt in prompts), end_ids(tokenizer, opened.model)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    device = next(opened.model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(p.ids)) + p.ids for p in prompts])
    beside = {name: values.to(device) for name, values in images_beside(prompts, tokenizer, ids).items()}
    ids = ids.to(device)
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)
    config = _config(opened.model.generation_config, settings.temperature, longest, ends, pad)
    output = opened.model.generate(ids, attention_mask=mask, generation_config=config, streamer=stream, **beside)
    found = []
    for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True):
        end = next((index for index, token in enumerate(row) if token in ends), None)
        said = row if end is None else row[: end + 1]
        found.append(Reply(text_of(said, tokenizer, ends), end is None, prompt))
    return found


def _config(own: GenerationConfig, temperature: float, longest: int, ends: list[int], pad: int) -> GenerationConfig:
    """The model's own, which may hold penalties, with what is asked for."""
    config = copy.deepcopy(own)
    for name in SAMPLING:
        setattr(config, name, None)
    config.update(
        do_sample=temperature > 0,
        max_new_tokens=longest,
        max_length=None,
        eos_token_id=ends,
        pad_token_id=pad,
        num_beams=1,
        return_dict_in_generate=False,
    )
    if temperature > 0:
        config.update(temperature=temperature, top_k=0, top_p=1.0)
    return config
