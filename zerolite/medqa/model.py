"""Model and tokenizer of a run, from local folders or built in; a mistake about a folder is found before any work."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    get_scheduler,
)

import zerolite
from zerolite.medqa.arguments import CORPUS, Options
from zerolite.medqa.images.sight import is_seeing, look
from zerolite.medqa.prompts import Example
from zerolite.medqa.template import template_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_tokenizer(options: Options) -> PreTrainedTokenizerBase:
    """The tokenizer; it must have an EOS token, since answers end with one.

    Raises ValueError where the folder is missing or holds no usable tokenizer.
    """
    given = [name for name in ("model_name_or_path", "tokenizer_name_or_path") if getattr(options, name) is not None]
    folders = [local_folder(f"--{name}", getattr(options, name)) for name in given]
    return read_tokenizer(folders[-1] if folders else CORPUS / "tokenizer")


def local_folder(option: str, name: str) -> Path:
    """The folder that an option names; ValueError, with the way to fetch it, where there is none."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    what = "a file" if folder.exists() else "none"
    raise ValueError(f"{option} {folder}: expected a local folder, there is {what}{fetching(name)}")


def fetching(name: str) -> str:
    """How to fetch what looks like a name of a hub; nothing for other names."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or Path(name).parent.exists():
        return ""
    return f"; a model of a hub is fetched first: hf download {name} --local-dir {name}"


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """As `load_tokenizer`, of a folder."""
    if not folder.is_dir():
        raise ValueError(f"tokenizer folder {folder}: expected a local folder, there is none")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a wrong value happens to hit
        why = cause(error)
        raise ValueError(f"{folder}: no usable tokenizer; name one with --tokenizer_name_or_path ({why})") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no EOS token, which every answer ends with")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{folder}: expected a tokenizer.json, got a tokenizer that does not tell where its tokens lie"
        )
    return tokenizer


def load_config(options: Options, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The model's configuration, checked against tokenizer and cutoff_len.

    Raises ValueError where the folder is missing, has no config.json or no safetensors, or where they do not fit.
    """
    if options.model_name_or_path is None:
        config = built_in(tokenizer)
    else:
        folder = local_folder("--model_name_or_path", options.model_name_or_path)
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model_name_or_path {folder}: expected config.json in it, there is none")
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"--model_name_or_path {folder}: expected *.safetensors in it, there is none; write the model again "
                "with save_pretrained (other weight files are pickles, which are not loaded)"
            )
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # as above
            raise ValueError(f"--model_name_or_path {folder}: config.json cannot be used: {cause(error)}") from error
    on_meta(options, config)
    check_vocabulary(tokenizer, config)
    if options.model_name_or_path is not None and look(folder, tokenizer, config) is None and options.image_folder:
        raise ValueError(
            f"--image_folder: {folder} is a model that reads texts alone: rows have images for one that sees"
        )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 40
    num_virtual = num_virtual_tokens(options)
    if options.cutoff_len + num_virtual > longest:
        beside = f" beside {num_virtual} virtual ones" if num_virtual else ""
        raise ValueError(
            f"--cutoff_len {options.cutoff_len}: this model reads at most {longest - num_virtual} tokens{beside}"
        )
    return config


def num_virtual_tokens(options: Options) -> int:
    """Positions that a prompt or a prefix takes from every row."""
    preset = zerolite.adapters.PRESETS[options.finetuning_type].tokens
    return (options.num_virtual_tokens or preset) if preset else 0


def auto_class(config: PretrainedConfig) -> type:
    """What of transformers builds the model of a configuration."""
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if is_seeing(config) and not is_causal else AutoModelForCausalLM


def on_meta(options: Options, config: PretrainedConfig) -> nn.Module:
    """The model without memory for its weights; ValueError where transformers cannot build it."""
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=False)
    except Exception as error:  # as of a tokenizer
        why = cause(error).split("\n")[0][:300]
        raise ValueError(
            f"--model_name_or_path {options.model_name_or_path}: config.json cannot be used: {why}"
        ) from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """ValueError where text has ids that the model has no embedding for; tokens added beside it may have such."""
    size, added = config.get_text_config().vocab_size, tokenizer.get_added_vocab()
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= size and token not in added]
    if beyond:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} pieces, the model only {size} embeddings, and {len(beyond)} pieces, "
            f"such as {beyond[0]!r}, have ids from there on: name the tokenizer that the model was trained with"
        )


def check_ids(examples: list[Example], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """ValueError for an id of a row that the model has no embedding for: it is of an added token."""
    size = config.get_text_config().vocab_size
    if max(tokenizer.get_vocab().values()) < size:
        return
    for example in examples:
        if (largest := int(example.input_ids.max())) >= size:
            raise ValueError(
                f"rows hold token {tokenizer.convert_ids_to_tokens(largest)!r}, id {largest}, and the model has {size} "
                "embeddings: another --template may do without it, else name the tokenizer that the model was trained "
                "with"
            )


def cause(error: Exception) -> str:
    """What transformers says of a folder that it cannot use."""
    if "trust_remote_code" in str(error):
        return "it needs Python code of the folder (auto_map), which is never run here"
    return str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"


def built_in(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """A LLaMA small enough to learn the shipped corpus on two cores in minutes."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def sharded(options: Options, config: PretrainedConfig, adapt: Callable[[nn.Module], object] | None) -> nn.Module:
    """The model, adapted, sharded over the ranks and offloaded as the options say. Every rank must call it."""
    precision = zerolite.Precision(param=DTYPES[options.precision], reduce=torch.float32)
    how = {"stage": options.stage, "offload": options.placement(), "precision": precision}
    torch.manual_seed(options.seed)  # initial values, of an adapter too
    if options.model_name_or_path is None:
        model = zerolite.shard(LlamaForCausalLM(config), **how)
    else:
        folder = Path(options.model_name_or_path).resolve()  # an adapter keeps the name, and is opened from elsewhere
        model = zerolite.load_pretrained(folder, adapt=adapt, **how)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def align_ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model stop where its training says so, and the configurations that go with it fit to be written.

    EOS of config.json and generation_config.json becomes what ends an answer, the tokenizer's EOS, and what was there.
    Flags of sampling are taken from a generation config that does not sample: transformers refuses to write it else.
    Raises ValueError where it still refuses.
    """
    for config in (model.config.get_text_config(), model.generation_config):
        there = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = [template_of(tokenizer).end_token_id, tokenizer.eos_token_id, *there]
        ends = list(dict.fromkeys(end for end in ends if end is not None))
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if not model.generation_config.do_sample:
        for name in SAMPLING:
            setattr(model.generation_config, name, None)
    model.generation_config.validate(strict=True)


OPTIMIZERS = {"adamw": zerolite.AdamW, "adam": zerolite.Adam, "lamb": zerolite.Lamb, "lion": zerolite.Lion}


def optimizer_of(options: Options, groups: list[dict]) -> torch.optim.Optimizer:
    return OPTIMIZERS[options.optim](groups, lr=options.learning_rate, max_grad_norm=options.max_grad_norm or None)


def scheduler_of(
    options: Options, optimizer: torch.optim.Optimizer, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    # "constant" of transformers has no warm-up.
    name = options.lr_scheduler_type.replace("constant", "constant_with_warmup")
    return get_scheduler(name, optimizer, math.ceil(options.warmup_ratio * num_steps), num_steps)
