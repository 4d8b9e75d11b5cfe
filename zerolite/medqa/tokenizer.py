"""The shipped tokenizer: a byte-level BPE trained on the first shipped training rows.

    python -m zerolite.medqa.tokenizer

writes `corpus/tokenizer/` again, byte for byte. Every byte is a piece, so any text comes back unchanged.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from zerolite.medqa import data, template
from zerolite.medqa.arguments import CORPUS

FOLDER = CORPUS / "tokenizer"
NUM_PIECES = 4096
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
# Not train.en_more.jsonl, which came later: the ids of a text are those of every model that was trained here.
LEARNED_FROM = [CORPUS / "train.en.jsonl", CORPUS / "train.zh.jsonl"]


def train(files: list[Path]) -> PreTrainedTokenizerFast:
    """A tokenizer of NUM_PIECES pieces, learned from the prompts and answers of `files`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_PIECES,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = [turn for row in data.read(files).kept for turn in row.turns]
    texts = [text for question, answer in turns for text in (template.QUESTION.format(question), answer)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        chat_template=template.ZEROLITE,
    )


if __name__ == "__main__":
    train(LEARNED_FROM).save_pretrained(FOLDER)
