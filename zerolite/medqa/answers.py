"""Greedy answers to a few held-out questions, English and Chinese."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

import zerolite
from zerolite.medqa.data import Conversation
from zerolite.medqa.processes import Processes
from zerolite.medqa.prompts import encode_prompt
from zerolite.medqa.template import template_of

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Answer:
    question: str
    generated: str
    reference: str


def held_out_questions(conversations: list[Conversation], each: int = 2) -> list[Conversation]:
    """The first `each` English and the first `each` Chinese conversations; others where a language has too few."""
    english = [c for c in conversations if not c.is_chinese]
    chinese = [c for c in conversations if c.is_chinese]
    chosen = english[:each] + chinese[:each]
    rest = english[each:] + chinese[each:]
    return chosen + rest[: 2 * each - len(chosen)]


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Conversation],
    processes: Processes,
    cutoff_len: int,
) -> list[Answer]:
    """Answers, on rank 0; the other ranks get none. Every rank must call it: at stage 3 it gathers the whole model."""
    answers = []
    model.eval()
    with zerolite.full_params(model):
        if processes.rank == 0:
            answers = [_answer(model, tokenizer, conversation, cutoff_len) for conversation in conversations]
    model.train()
    return answers


@torch.no_grad()
def _answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, cutoff_len: int
) -> Answer:
    prompt = encode_prompt(conversation, tokenizer, cutoff_len // 2)
    input_ids = torch.tensor([prompt], device=next(model.parameters()).device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(MAX_NEW_TOKENS, cutoff_len - len(prompt)),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[template_of(tokenizer).end_token_id, tokenizer.eos_token_id],
        pad_token_id=tokenizer.eos_token_id,
    )
    # Whole parameters are here, and only this rank generates: no step of it may wait for the others.
    output = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config, synced_gpus=False
    )
    generated = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
    question, reference = conversation.turns[0]
    return Answer(question, generated.strip(), reference)
