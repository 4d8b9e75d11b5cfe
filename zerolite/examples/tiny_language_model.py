"""A language model, its tokenizer and texts, so small and so quickly made that an example needs no download."""

import random
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = (
    "a the fever cough pain dose doctor patient takes has for with rest water no mild severe after before day".split()
)
CHAT = "{% for message in messages %}<s> {{ message['role'] }} : {{ message['content'] }} </s> {% endfor %}"


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of 6 to 14 words."""
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=choose.randint(6, 14))) for _ in range(count)]


def conversations(count: int, seed: int = 0) -> list[dict]:
    """Rows of `messages`, as TRL's conversational datasets have them."""
    said = partial(sentences, count)
    pairs = zip(said(seed), said(seed + 1), strict=True)
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]


def tiny_folder() -> str:
    """A new folder with a model of two layers and a tokenizer of words, as the hub has them; alike on every rank."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-language-model-"))
    vocabulary = [*SPECIAL, *WORDS, "user", "assistant", ":"]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, begin, end, unknown = SPECIAL
    special = dict(pad_token=pad, bos_token=begin, eos_token=end, unk_token=unknown)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT, **special)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)
    # The model's own save_pretrained writes on one rank alone.
    save_file(LlamaForCausalLM(config).state_dict(), folder / "model.safetensors", {"format": "pt"})
    return str(folder)
