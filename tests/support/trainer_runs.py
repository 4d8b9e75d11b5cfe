"""Trainers of transformers and TRL on tiny models, by zerolite and by themselves: logs, parameters, files.

Everything is of fp64: the loss, too, where a trainer lets it be given.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import trl
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from models import drawn, llama, t5, whole
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import zerolite
from zerolite.engine.engine import find_engine
from zerolite.integrations.transformers import ZeroMixin, ZeroTrainer

ROWS, EVAL_ROWS, STEPS = 16, 4, 4
MAX_NORMS = {"trainer": 0.5, "seq2seq": 0.5, "sft": 0.5, "sft-lora": 0.5, "dpo": 0.5, "dpo-lora": 0.05}
LOGGED = ("loss", "grad_norm", "eval_loss", "learning_rate", "eval_sum", "epoch", "rewards/margins")


class ZeroSFT(ZeroMixin, trl.SFTTrainer):
    pass


class ZeroDPO(ZeroMixin, trl.DPOTrainer):
    pass


class ZeroSeq2Seq(ZeroMixin, Seq2SeqTrainer):
    pass


TRAINERS: dict[str, tuple[type, type, type]] = {
    "trainer": (Trainer, ZeroTrainer, TrainingArguments),
    "seq2seq": (Seq2SeqTrainer, ZeroSeq2Seq, Seq2SeqTrainingArguments),
    "sft": (trl.SFTTrainer, ZeroSFT, trl.SFTConfig),
    "sft-lora": (trl.SFTTrainer, ZeroSFT, trl.SFTConfig),
    "dpo": (trl.DPOTrainer, ZeroDPO, trl.DPOConfig),
    "dpo-lora": (trl.DPOTrainer, ZeroDPO, trl.DPOConfig),
}


@dataclass
class Trained:
    logs: list[dict[str, float]]
    parameters: dict[str, Tensor]  # of this rank's run, whole


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def token_rows(count: int, seed: int) -> list[list[int]]:
    """Rows of 3 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=generator).tolist()
    return [torch.randint(4, 64, (length,), generator=generator).tolist() for length in lengths]


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    batch = {}
    for name, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        if name in rows[0]:
            length = max(len(row[name]) for row in rows)
            batch[name] = torch.tensor([row[name] + [padding] * (length - len(row[name])) for row in rows])
    return batch


def rows_of(kind: str, count: int, seed: int):
    ids = token_rows(count, seed)
    if kind.startswith("sft"):
        return Dataset.from_list([{"input_ids": row} for row in ids])
    if kind.startswith("dpo"):
        texts = [" ".join(tokenizer().convert_ids_to_tokens(row)) for row in ids]
        others = texts[1:] + texts[:1]
        pairs = zip(texts, others, strict=True)
        return Dataset.from_list([{"prompt": "w1 w2 ", "chosen": one, "rejected": other} for one, other in pairs])
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row[::-1]} for row in ids]


def mean_loss(outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
    """Cross-entropy in the logits' dtype; transformers' own is of fp32."""
    logits = outputs.logits
    if logits.shape[1] == labels.shape[1] and not hasattr(outputs, "encoder_last_hidden_state"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count


def model_of(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    model = drawn(t5 if kind == "seq2seq" else llama, seed).to(dtype)
    if kind == "seq2seq":
        model.generation_config.max_new_tokens = 5
    return model


def arguments_of(kind: str, folder: Path, **given):
    defaults = dict(
        output_dir=str(folder), use_cpu=True, report_to=[], max_steps=STEPS, per_device_train_batch_size=2,
        per_device_eval_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=MAX_NORMS[kind], learning_rate=1e-2,
        weight_decay=0.1, warmup_steps=1, logging_steps=1, eval_strategy="steps", eval_steps=2, save_strategy="no",
        disable_tqdm=True, seed=3,
    )  # fmt: skip
    if kind == "seq2seq":
        defaults |= dict(predict_with_generate=True)
    if kind.startswith(("sft", "dpo")):
        defaults |= dict(bf16=False, gradient_checkpointing=False)
    return TRAINERS[kind][2](**{**defaults, **given})


def options_of(kind: str) -> dict:
    if kind.startswith(("sft", "dpo")):
        options: dict = dict(processing_class=tokenizer())
        if kind.endswith("lora"):
            options["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        elif kind == "dpo":
            options["ref_model"] = model_of(kind, seed=1)
        return options
    options = dict(data_collator=pad)
    if kind == "trainer":
        options["compute_loss_func"] = mean_loss
    else:
        options["compute_metrics"] = lambda predicted: {"sum": float(predicted.predictions.sum())}
    return options


def trainer_of(kind: str, folder: Path, zero: dict | None, *, model=None, options: dict | None = None, **given):
    """The trainer, by itself where `zero` is None and the model is not sharded; `given`: TrainingArguments."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    plain, by_zerolite, _ = TRAINERS[kind]
    model = model_of(kind) if model is None else model
    options = {**options_of(kind), **(options or {})}
    if "model_init" in options:
        model = None
    is_ours = zero is not None or (model is not None and find_engine(model) is not None)
    if zero is not None:
        options["zero"] = zero
    return (by_zerolite if is_ours else plain)(
        model=model,
        args=arguments_of(kind, folder, **given),
        train_dataset=rows_of(kind, ROWS, 11),
        eval_dataset=rows_of(kind, EVAL_ROWS, 12),
        **options,
    )


def result_of(trainer) -> Trained:
    logs = [{name: row[name] for name in LOGGED if name in row} for row in trainer.state.log_history]
    if find_engine(trainer.model) is None:
        return Trained(logs, whole(trainer.model))
    with zerolite.full_params(trainer.model):
        return Trained(logs, whole(trainer.model))


def train(kind: str, folder: Path, zero: dict | None, *, resume: str | None = None, **given) -> Trained:
    trainer = trainer_of(kind, folder, zero, **given)
    trainer.train(resume_from_checkpoint=resume)
    return result_of(trainer)
