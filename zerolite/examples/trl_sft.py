"""Supervised fine-tuning with TRL's SFTTrainer, in the shape of its sft.py, on sharded states; LoRA with --use_peft.

    torchrun --standalone --nproc-per-node 2 -m zerolite.examples.trl_sft --output_dir out --use_peft

Lines marked `# zerolite` differ from the script for DDP: new ones, or what one was.
"""

import json
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from zerolite.examples import tiny_language_model
from zerolite.integrations.transformers import ZeroMixin  # zerolite


class ZeroSFTTrainer(ZeroMixin, SFTTrainer):  # zerolite
    """SFTTrainer on shards."""  # zerolite


@dataclass
class ScriptArguments:
    train_file: str = field(default="", metadata={"help": "JSON rows of messages; none: made-up conversations."})


def rows_of(path: str) -> list[dict]:
    if not path:
        return tiny_language_model.conversations(64)
    with open(path, encoding="utf-8") as lines:
        return [{"messages": json.loads(line)["messages"]} for line in lines]


def main() -> None:
    script, args, model_args = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config()

    folder = model_args.model_name_or_path or tiny_language_model.tiny_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    split = Dataset.from_list(rows_of(script.train_file)).train_test_split(test_size=0.1, seed=args.seed)

    trainer = ZeroSFTTrainer(  # zerolite: was trainer = SFTTrainer(
        model=model,
        args=args,
        zero=dict(stage=2),  # zerolite
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )

    trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
