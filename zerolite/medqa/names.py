"""What other programs call the options of `train_medqa.py`: names that are taken, and names that have a hint instead.

Mostly LLaMA-Factory's and transformers'. An alias means the same here; whatever does not is refused with what to do.
"""

import difflib
import re
from collections.abc import Collection, Iterable

ALIASES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "max_length": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "model_max_length": "cutoff_len",
    "model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "model_name": "model_name_or_path",
    "tokenizer": "tokenizer_name_or_path",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_target",
    "target_modules": "lora_target",
    "pre_seq_len": "num_virtual_tokens",
    "data_path": "train_file",
    "train_files": "train_file",
    "media_dir": "image_folder",
    "validation_files": "validation_file",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "clip_grad": "max_grad_norm",
    "zero_stage": "stage",
    "resume_from_checkpoint": "resume",
}

# Values of other programs that mean one of ours.
VALUES = {
    "optim": {name: "adamw" for name in ("adamw_torch", "adamw_torch_fused", "adamw_hf", "AdamW")},
    "lr_scheduler_type": {"constant_with_warmup": "constant"},  # ours has a warm-up
    "precision": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
}

HINTS = {
    "adapter_name_or_path": "--resume FOLDER goes on from a checkpoint of a run; an adapter of another run is no start "
    "here: merge it first (--export_merged) and name that model",
    "additional_target": "no module is trained whole beside a LoRA; --finetuning_type full trains all",
    "dataset": "name the files themselves: --train_file rows.jsonl more.csv",
    "dataset_dir": "name the files themselves: --train_file rows.jsonl more.csv",
    "ddp_timeout": "leave it out: ranks wait ten minutes for each other",
    "deepspeed": "leave its file out: --stage 0, 1, 2 or 3 and --offload cpu say the same",
    "do_train": "leave it out: every run trains",
    "do_eval": "leave it out: every run validates before and after, and each --eval_steps",
    "eval_strategy": "--eval_steps N validates every N optimizer steps, 0 only before and after",
    "evaluation_strategy": "--eval_steps N validates every N optimizer steps, 0 only before and after",
    "freeze_multi_modal_projector": "leave it out: the projector trains, --freeze_vision_tower is about the tower",
    "flash_attn": "leave it out: transformers chooses the attention",
    "fsdp": "leave it out: --stage 3 shards parameters, gradients and optimizer states",
    "gpus": "start the script with torchrun --nproc-per-node N, a process for each GPU",
    "image_max_pixels": "leave it out: sizes are those of the model's image processor (preprocessor_config.json)",
    "load_in_4bit": "leave it out: weights are read and trained in 16 or 32 bits",
    "load_in_8bit": "leave it out: weights are read and trained in 16 or 32 bits",
    "local_rank": "start the script with torchrun, which tells ranks by the environment",
    "mask_history": "`weight: 0` in a message leaves an answer without loss; all others are learned",
    "num_gpus": "start the script with torchrun --nproc-per-node N, a process for each GPU",
    "overwrite_cache": "leave it out: nothing is cached",
    "overwrite_output_dir": "a result is never overwritten: name another --output_dir, or move the old folder",
    "per_device_eval_batch_size": "leave it out: validation takes --per_device_train_batch_size rows at a time",
    "plot_loss": "leave it out: loss.png is always drawn",
    "preprocessing_num_workers": "leave it out: one process reads the rows",
    "push_to_hub": "leave it out: nothing is uploaded; `hf upload` does it",
    "quantization_bit": "leave it out: weights are read and trained in 16 or 32 bits; --offload cpu saves memory",
    "resize_vocab": "leave it out: the tokenizer has to be the model's own",
    "save_only_model": "leave it out: the result is a model or an adapter alone, a checkpoint is a whole run",
    "save_strategy": "--save_steps N writes a checkpoint every N optimizer steps",
    "train_on_prompt": "leave it out: answers alone have loss",
    "trust_remote_code": "leave it out: Python code of a model folder is never run",
    "warmup_steps": "--warmup_ratio gives the part of all steps in which the rate rises",
}

# Values that are right elsewhere and mean nothing here: what follows `--name value: `.
WRONG_VALUES = {
    "stage": (
        re.compile(r"sft|pt|rm|ppo|dpo|kto"),
        "is a kind of training elsewhere, here --stage is ZeRO's, 0 to 3; questions and answers are trained "
        "(sft), and nothing has to say so: leave it out",
    ),
    "template": (
        re.compile(r"default|llama[23]?|qwen[23.5]*|chatglm\d?|glm\d|vicuna|mistral|chatml|gemma\d?|yi|baichuan\d?"),
        "is a name of LLaMA-Factory's; the model's own template is used where it has one: leave it out, or name own, "
        "zerolite, alpaca or a file of Jinja",
    ),
}


def ours(name: str, known: Collection[str]) -> str:
    """The option that `name` (without dashes in front) means; `name` itself where it is none."""
    plain = name.replace("-", "_")
    if plain in known:
        return plain
    return ALIASES.get(plain, name)


def ours_on_command_line(argv: Iterable[str], known: Collection[str]) -> list[str]:
    """The words of a command line with their options as ours; `--bf16` and its like become `--precision`."""
    words: list[str] = []
    precisions: dict[str, object] = {}
    pending = None  # --bf16 or --fp16, whose value may follow
    for word in argv:
        if pending and word.lower() in ("true", "false"):
            precisions[pending] = word.lower() == "true"
            pending = None
            continue
        pending = None
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            words.append(word)
        elif name in ("bf16", "fp16"):
            precisions[name] = value.lower() != "false"
            pending = None if equals else name
        else:
            is_negated = name.startswith("no-")
            found = ours(name.removeprefix("no-"), known)
            words.append(f"--{'no-' * is_negated}{found}{equals}{value}")
    precision = precision_of(precisions)
    return words + ([f"--precision={precision}"] if precision else [])


def ours_in_file(values: dict, known: Collection[str], where: str) -> dict:
    """The names of a file as ours. ValueError for two that are one option."""
    found: dict = {}
    precisions = {name: values[name] for name in ("bf16", "fp16") if isinstance(values.get(name), bool)}
    for name, value in values.items():
        if name not in precisions:
            mine = ours(name, known) if isinstance(name, str) else name
            if mine in found:
                raise ValueError(f"{where}: {name} and another name there are one option, {mine}: give it once")
            found[mine] = value
    if precision := precision_of(precisions):
        if found.get("precision", precision) != precision:
            raise ValueError(f"{where}: precision {found['precision']!r} and {precisions} do not go together")
        found["precision"] = precision
    return found


def precision_of(given: dict) -> str | None:
    """What transformers' bf16 and fp16 mean; None: nothing is said. ValueError for both."""
    if given.get("bf16") and given.get("fp16"):
        raise ValueError("bf16 and fp16: expected one of them")
    chosen = [name for name, is_on in given.items() if is_on]
    if chosen:
        return chosen[0]
    return "fp32" if "bf16" in given else None  # fp16 is never a default, bf16 is on a GPU


def our_value(name: str, value):
    """A value of an option as ours; ValueError for one that means nothing here."""
    if isinstance(value, str):
        value = VALUES.get(name, {}).get(value, value)
        if name in WRONG_VALUES and WRONG_VALUES[name][0].fullmatch(value):
            raise ValueError(f"{value!r} {WRONG_VALUES[name][1]}")
    return value


def targets(given: tuple[str, ...]) -> tuple[str, ...]:
    """`lora_target` with names between commas apart, and LLaMA-Factory's `all` as PEFT's all-linear."""
    found: list[str] = []
    for one in given:
        names = [name.strip() for name in one.split(",")]
        is_list = all(re.fullmatch(r"[\w.-]+", name) for name in names)  # else a regular expression
        found += names if is_list else [one]
    return ("all-linear",) if found == ["all"] else tuple(found)


def unknown(name: str, known: list[str]) -> str:
    """What is said of an option that is not ours: the hint for another program's, else what is near it."""
    hint = HINTS.get(name.lstrip("-").split("=")[0].replace("-", "_"))
    if hint is not None:
        return f"unknown option {name!r}: {hint}"
    near = difflib.get_close_matches(name.split("=")[0], known, n=3, cutoff=0.6)
    return f"unknown option {name!r}: " + (f"did you mean {' or '.join(near)}?" if near else "--help lists all")
