"""Causal language modelling with transformers' Trainer, in the shape of its run_clm.py, on sharded states.

    torchrun --standalone --nproc-per-node 2 -m zerolite.examples.hf_trainer --output_dir out

Lines marked `# zerolite` differ from the script for DDP: new ones, or what one was.
"""

import math
from dataclasses import dataclass, field
from itertools import chain

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from zerolite.examples import tiny_language_model
from zerolite.integrations.transformers import ZeroTrainer  # zerolite: was from transformers import Trainer


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(default="", metadata={"help": "A model of the hub or a folder; none: a tiny one."})
    train_file: str = field(default="", metadata={"help": "Lines of text; none: made-up sentences."})
    block_size: int = field(default=32, metadata={"help": "Tokens of a row: texts are joined, and cut into such."})


def grouped(texts: list[str], tokenizer, block_size: int) -> Dataset:
    """Texts joined into rows of `block_size` tokens, whose labels are the tokens themselves."""
    tokens = list(chain.from_iterable(tokenizer(text + tokenizer.eos_token)["input_ids"] for text in texts))
    rows = [tokens[start : start + block_size] for start in range(0, len(tokens) - block_size + 1, block_size)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * block_size for _ in rows], "labels": rows})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)

    folder = script.model_name_or_path or tiny_language_model.tiny_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if script.train_file:
        texts = open(script.train_file, encoding="utf-8").read().splitlines()
    else:
        texts = tiny_language_model.sentences(200)
    split = grouped(texts, tokenizer, script.block_size).train_test_split(test_size=0.1, seed=args.seed)

    trainer = ZeroTrainer(  # zerolite: was trainer = Trainer(
        model=model,
        args=args,
        zero=dict(stage=3, offload="cpu"),  # zerolite
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )

    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()

    metrics = trainer.evaluate()
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
