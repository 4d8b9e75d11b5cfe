"""Greedy answers to a few held-out questions, English and Chinese, before and after training.

They are kept in `answers.jsonl` beside the result, so that a run that is stopped and goes on shows both.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

import zerolite
from zerolite.medqa.data import Conversation
from zerolite.medqa.processes import Processes, StopSignals
from zerolite.medqa.progress import read_metrics
from zerolite.medqa.prompts import first_prompt, images_beside
from zerolite.medqa.template import template_of

ANSWERS = "answers.jsonl"
MAX_NEW_TOKENS = 128
REPETITION_PENALTY = 1.1  # without it, small models say one thing over and over
CUT_OFF = " …"  # behind an answer that the model had not ended
NOTICE = "This is no medical advice."
NO_TOKEN = -1


@dataclass(frozen=True)
class Answer:
    """What the model said after `step` optimizer steps."""

    step: int
    question: str
    generated: str
    reference: str
    notice: str = NOTICE


def held_out_questions(conversations: list[Conversation], each: int = 2) -> list[Conversation]:
    """The first `each` English and the first `each` Chinese conversations; others where a language has too few."""
    english = [c for c in conversations if not c.is_chinese]
    chinese = [c for c in conversations if c.is_chinese]
    chosen = english[:each] + chinese[:each]
    rest = english[each:] + chinese[each:]
    return chosen + rest[: 2 * each - len(chosen)]


# --- asking ---------------------------------------------------------------------------------------------------------


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Conversation],
    processes: Processes,
    cutoff_len: int,
    signals: StopSignals | None = None,
) -> list[str] | None:
    """The answer to the first question of each conversation, on every rank; None once a rank received a signal.

    Every rank must call it: each answers its share of them, with whole parameters at every stage.
    """
    if not conversations:
        return []
    mine: dict[int, list[int]] = {}
    model.eval()
    try:
        with zerolite.full_params(model):
            for number in range(processes.rank, len(conversations), processes.world_size):
                mine[number] = _generate(model, tokenizer, conversations[number], cutoff_len, signals)
    finally:
        model.train()
    if signals is not None and signals.agreed(processes.sum(*signals.counts())):
        return None
    texts = []
    for number in range(len(conversations)):
        said = mine.get(number, [])
        rows = processes.gather(*said, *[NO_TOKEN] * (MAX_NEW_TOKENS - len(said)))
        answered = rows[number % processes.world_size]
        ids = [int(token) for token in answered if token != NO_TOKEN]
        texts.append(text_of(ids, tokenizer, _end_ids(tokenizer)))
    return texts


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [template_of(tokenizer).end_token_id, tokenizer.eos_token_id]


def text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int]) -> str:
    """The answer that these ids are, with CUT_OFF where no end token is the last of them."""
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if ids and ids[-1] in end_ids:
        return text
    return text.rstrip("\ufffd") + CUT_OFF  # the cut may lie inside of a character


@torch.no_grad()
def _generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    cutoff_len: int,
    signals: StopSignals | None,
) -> list[int]:
    """Token ids of the answer, with what ends it; fewer once this process received one of `signals`."""
    found = first_prompt(conversation, tokenizer, cutoff_len)
    prompt, device = found.ids, next(model.parameters()).device
    input_ids = torch.tensor([prompt])
    beside = images_beside([found], tokenizer, input_ids)
    input_ids = input_ids.to(device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(MAX_NEW_TOKENS, cutoff_len - len(prompt)),
        repetition_penalty=REPETITION_PENALTY,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=_end_ids(tokenizer),
        pad_token_id=tokenizer.eos_token_id,
    )

    def is_stopped(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.full((len(ids),), signals is not None and any(signals.counts()), device=ids.device)

    # Whole parameters are here, and each rank generates its own: no step of it may wait for the others.
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=config,
        synced_gpus=False,
        stopping_criteria=[is_stopped],
        **{name: values.to(device) for name, values in beside.items()},
    )
    return output[0, len(prompt) :].tolist()


# --- keeping --------------------------------------------------------------------------------------------------------


def keep(folder: Path, step: int, conversations: list[Conversation], generated: list[str]) -> None:
    """Write the answers of `step` behind those of earlier steps; what an earlier run left of later ones goes."""
    kept = [one for one in read(folder) if one.step < step]
    for conversation, text in zip(conversations, generated, strict=True):
        question, reference = conversation.turns[0]
        kept.append(Answer(step, question, text, reference))
    written = (folder / ANSWERS).with_suffix(".part")
    written.write_text("".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in kept), encoding="utf-8")
    written.replace(folder / ANSWERS)


def read(folder: Path) -> list[Answer]:
    """The kept answers in the order in which they were given; none where there is no file."""
    return [Answer(**record) for record in read_metrics(folder / ANSWERS)]


def shown(answers: list[Answer]) -> str:
    """Questions in Markdown with the answers before (where it was asked) and after training, and the reference.

    Those of evaluations in between stay in the file.
    """
    last = max((one.step for one in answers), default=0)
    before = {(one.question, one.reference): one.generated for one in answers if one.step == 0 < last}
    blocks = []
    for one in answers:
        if one.step == last:
            was = before.get((one.question, one.reference))
            lines = [
                f"**Question** {one.question}",
                *([f"**Before training** {was}"] if was is not None else []),
                f"**After training** {one.generated}",
                f"**Reference** {one.reference}",
                f"*{one.notice}*",
            ]
            blocks.append("\n\n".join(lines))
    return "\n\n".join(blocks) or "There was no held-out question to ask."
