"""What of the model is trained, all of it or an adapter: the stage that suits, guards, and the result."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

import zerolite
from zerolite import adapters
from zerolite.medqa.arguments import Options
from zerolite.medqa.images import tower
from zerolite.medqa.images.sight import SIGHTS
from zerolite.medqa.machine import mib
from zerolite.medqa.model import on_meta
from zerolite.medqa.processes import Processes
from zerolite.medqa.prompts import IGNORED, Example

PARAMETER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Of a rank's memory that a whole frozen base may take; activations and the adapter need the rest.
BASE_SHARE = 0.6


def adaptation(options: Options, tokenizer: PreTrainedTokenizerBase) -> Callable[[nn.Module], object] | None:
    """What adds the adapter to a model, or freezes the tower of one that sees; None where nothing is to be done.

    ValueError for a text without tokens.
    """
    keeps_tower = tokenizer in SIGHTS and options.freeze_vision_tower
    if not options.is_adapter:
        freeze = tower.freeze if options.image_folder is not None else tower.freeze_sight
        return freeze if keeps_tower else None
    if options.finetuning_type == "lora":
        given = None if options.lora_target is None else lora_targets(options.lora_target)

        def targets_in(model: nn.Module) -> dict:
            if given is None:  # the language model's attention, also of a model that sees
                return {}
            is_names = given == "all-linear" or not isinstance(given, str)
            names = (given,) if isinstance(given, str) else given
            return {"targets": (keeps_tower and is_names and tower.outside(model, names)) or given}

        return lambda model: adapters.add_lora(
            model,
            r=options.lora_rank,
            alpha=options.lora_alpha,
            dropout=options.lora_dropout,
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
            **targets_in(model),
        )
    chosen = {"init": options.prompt_init, "encoder": options.prompt_encoder}
    if options.prompt_init_text is not None:
        chosen["text_ids"] = tokenizer(options.prompt_init_text, add_special_tokens=False)["input_ids"]
        if not chosen["text_ids"]:
            raise ValueError(f"--prompt_init_text {options.prompt_init_text!r}: the tokenizer makes no token of it")
    return lambda model: adapters.add_prompt(
        model,
        kind=options.finetuning_type,
        tokens=options.num_virtual_tokens or adapters.PRESETS[options.finetuning_type].tokens,
        **{name: value for name, value in chosen.items() if value is not None},
    )


def lora_targets(given: tuple[str, ...]) -> tuple[str, ...] | str:
    """Names as they are; one value that is "all-linear" or no plain name (a regular expression) as a string."""
    if len(given) == 1 and (given[0] == "all-linear" or not re.fullmatch(r"[\w.]+", given[0])):
        return given[0]
    return given


def stage_of(options: Options, config: PretrainedConfig, ranks: Processes) -> tuple[int, str | None]:
    """(the stage to train at, what to tell about it). Every rank must call it.

    A frozen base that fits stays whole on every rank: at stage 3 it would be gathered for every forward and backward,
    while an adapter's gradients are a few megabytes.
    """
    if not options.is_adapter:
        return (2 if options.stage is None else options.stage), None
    numel = sum(parameter.numel() for parameter in on_meta(options, config).parameters())
    base_bytes = numel * PARAMETER_BYTES[options.precision]
    room_bytes = min(row[0] for row in ranks.gather(memory_bytes(ranks.device)))
    fits = base_bytes <= BASE_SHARE * room_bytes
    if options.offload_parameters:
        return 3, None
    stage = (2 if fits else 3) if options.stage is None else options.stage
    base, room = (f"{value / 2**20:,.0f} MiB" for value in (base_bytes, room_bytes))
    gathered = f"{2 * base_bytes / 2**20:,.0f} MiB"
    where = f"the frozen base takes {base} of the {room} that a rank has"
    if stage == 3:
        line = f"stage 3: {where}; it is sharded, and {gathered} are gathered for every micro-batch"
        if fits:
            line += "; it would fit: --stage 2 keeps it whole on every rank and gathers nothing"
    else:
        line = f"stage {stage}: {where}, so it stays whole there; stage 3 would gather {gathered} for every micro-batch"
    return stage, line


def memory_bytes(device: torch.device) -> int:
    """What a rank can use: its GPU's memory, or its share of what is free on the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def optimizer_groups(options: Options, model: nn.Module) -> list[dict]:
    """Param groups: matrices decay, vectors do not; a LoRA's B may have a learning rate of its own."""
    if options.is_adapter:
        return adapters.parameter_groups(
            model, options.learning_rate, loraplus_ratio=options.loraplus_lr_ratio, weight_decay=options.weight_decay
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def check_labels(examples: list[Example], end_token_id: int) -> None:
    """Every row has label tokens and what ends an answer is the last, else the model never learns to answer or stop.

    A passage has its EOS where it ends, which is not where it is cut.
    """
    for row, example in enumerate(examples):
        learned = example.labels[example.labels != IGNORED]
        if not len(learned):
            raise zerolite.DataError(f"row {row} of the training data has no label token: nothing is learned from it")
        if learned[-1] != end_token_id and not example.is_text:
            raise zerolite.DataError(
                f"row {row} of the training data does not end with EOS ({end_token_id}) in its labels: the model would "
                "never learn to stop"
            )


def trainable_table(model: nn.Module, options: Options) -> str:
    """What is trained and what is frozen: parameters and their MiB."""
    width = PARAMETER_BYTES[options.precision]
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    total = sum(counts.values())
    lines = ["| | parameters | share | MiB |", "|---|---:|---:|---:|"]
    for name, numel in ((f"trained ({options.finetuning_type})", counts[True]), ("frozen", counts[False])):
        lines.append(f"| {name} | {numel:,} | {100 * numel / total:.3f} % | {mib(numel * width)} |")
    return "\n".join(lines)


def write_result(options: Options, model: nn.Module, tokenizer, folder: Path, ranks: Processes) -> Path:
    """Write the trained model, or the adapter and, where asked for, the merged model. Every rank must call it."""
    if options.is_adapter:
        adapters.save(model, folder / "adapter")
        if ranks.rank == 0:
            tokenizer.save_pretrained(folder / "adapter")  # with the template that it was trained with
        if not options.export_merged:
            return folder / "adapter"
        difference = adapters.merge(model)
        ranks.print(f"merged in fp32: logits differ from the adapter's by {difference:.2e} at most")
    zerolite.export(model, folder / "model")
    if ranks.rank == 0:
        tokenizer.save_pretrained(folder / "model")
        if tokenizer in SIGHTS:
            SIGHTS[tokenizer].write(folder / "model")
    return folder / "model"
