"""The options of `train_medqa.py`: a frozen dataclass, filled from the command line and from a YAML file.

Names are LLaMA-Factory's where it has one. The command line wins over the file, the file over the defaults.
"""

import argparse
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

import zerolite
from zerolite.medqa import names
from zerolite.medqa.images import options as of_images
from zerolite.medqa.layouts import columns_of
from zerolite.medqa.split import check_size
from zerolite.medqa.values import checked

CORPUS = Path(__file__).parent / "corpus"
OPTIONS = "options.yaml"  # of a run, in its output folder
FINETUNING_TYPES = ("full", "lora", "prompt", "prefix", "p-tuning", "p-tuning-v2")


def option(default, kind: type, help: str, *, choices: tuple = (), least=None, above=None, most=None, many=False):
    """A field: its default, its type, and what values are allowed; `many`: one or more values, kept as a tuple."""
    limits = {"kind": kind, "help": help, "choices": choices, "least": least, "above": above, "most": most}
    return dataclasses.field(default=default, metadata={**limits, "many": many})


@dataclass(frozen=True)
class Options:
    """What a run is; None stands for "see the help text"."""

    # Model
    model_name_or_path: str | None = option(
        None, str, "local Hugging Face causal LM folder with safetensors (default: a small LLaMA from scratch)"
    )
    tokenizer_name_or_path: str | None = option(
        None, str, "local tokenizer folder (default: the model's folder, or the shipped tokenizer)"
    )
    template: str | None = option(
        None,
        str,
        "chat template: own, zerolite, alpaca, or a file of Jinja (default: the model's own, where it has one)",
    )
    # What is trained
    finetuning_type: str = option(
        "full", str, "all parameters, or an adapter of a frozen pretrained model", choices=FINETUNING_TYPES
    )
    freeze_vision_tower: bool = option(True, bool, "the tower of a model that reads images does not train")
    lora_rank: int = option(8, int, "r: columns that a LoRA adds to a projection", least=1, most=256)
    lora_alpha: float = option(16.0, float, "what a LoRA adds is scaled by alpha / r", above=0)
    lora_dropout: float = option(0.05, float, "of a LoRA's inputs, in training", least=0)
    lora_target: tuple[str, ...] | None = option(
        None,
        str,
        "names of projections, all-linear, or a regular expression (default: q_proj k_proj v_proj)",
        many=True,
    )
    use_rslora: bool = option(False, bool, "scale by alpha / sqrt(r) instead")
    use_dora: bool = option(False, bool, "learn magnitudes beside directions (DoRA)")
    loraplus_lr_ratio: float | None = option(
        None, float, "LoRA+: learning rate of B over that of A (default: the same)", above=0
    )
    num_virtual_tokens: int | None = option(None, int, "length of a prompt or prefix (default: by type)", least=1)
    prompt_init: str | None = option(
        None, str, "how it starts (default: by type)", choices=("random", "vocabulary", "text", "zeros")
    )
    prompt_init_text: str | None = option(None, str, "the text of --prompt_init text")
    prompt_encoder: str | None = option(
        None, str, "network that a prompt passes through in training (default: by type)", choices=("mlp", "lstm")
    )
    export_merged: bool = option(False, bool, "also write the model with its LoRA merged, as a Hugging Face folder")
    # Memory
    auto: bool = option(
        False, bool, "stage, offload and gradient_checkpointing as zerolite.recommend has it; what you set stays"
    )
    stage: int | None = option(
        None,
        int,
        "ZeRO stage: what is sharded over the ranks (default: 2, or 3 where a frozen model does not fit)",
        choices=(0, 1, 2, 3),
    )
    precision: str | None = option(
        None, str, "dtype of parameters (default: bf16 on CUDA, fp32 on the CPU)", choices=("fp32", "bf16", "fp16")
    )
    gradient_checkpointing: bool | None = option(
        None, bool, "recompute activations in the backward pass (default: no, or by --auto)"
    )
    offload: str | None = option(
        None,
        str,
        "cpu: gradients and optimizer states lie, and are stepped, on the host (default: none, or by --auto)",
        choices=("none", "cpu"),
    )
    offload_budget: str | None = option(
        None, str, "device memory for model states on each rank, as 20GiB: only the rest leaves (default: all leave)"
    )
    offload_workers: int | None = option(None, int, "optimizer processes of each rank (default: 1)", least=1)
    offload_states: str = option("fp32", str, "how the host keeps moments", choices=("fp32", "bf16", "int8"))
    offload_parameters: bool | None = option(
        None, bool, "parameters in host memory too, at stage 3 (default: no, or by --auto)"
    )
    offload_path: str | None = option(
        None, str, "folder on a local NVMe drive for the moments (default: in host memory)"
    )
    # Data
    train_file: tuple[str, ...] | None = option(
        None, str, "files to train on: JSONL, JSON, CSV, Parquet ... (default: the shipped corpus)", many=True
    )
    validation_file: tuple[str, ...] | None = option(
        None, str, "files to validate on (default: none beside your own train_file, else shipped rows)", many=True
    )
    val_size: float | None = option(
        None,
        float,
        "validate on a part of your training rows, in whole groups: below 1 a fraction, else a number of rows",
        least=0,
    )
    columns: str | None = option(
        None,
        str,
        "what the columns of your files are: question=title,context=ask,answer=reply (default: known layouts)",
    )
    image_folder: str | None = option(None, str, "folder of the images that rows name, for a model that reads images")
    max_samples: int | None = option(None, int, "use at most so many rows of each file (default: all)", least=1)
    cutoff_len: int = option(512, int, "longest sequence in tokens; longer rows are shortened and counted", least=16)
    packing: bool = option(False, bool, "several rows in one sequence of cutoff_len, where no token sees another row")
    skip_invalid: bool = option(False, bool, "count unusable rows and write them to rejected.jsonl, do not stop")
    # Training
    per_device_train_batch_size: int = option(4, int, "rows of a micro-batch on each rank", least=1)
    gradient_accumulation_steps: int = option(1, int, "micro-batches of an optimizer step", least=1)
    num_train_epochs: float | None = option(
        None, float, "passes over the training rows (default: 8 from scratch, 3 from a pretrained model)", above=0
    )
    max_steps: int | None = option(None, int, "optimizer steps, instead of num_train_epochs", least=1)
    optim: str = option("adamw", str, "optimizer", choices=("adamw", "adam", "lamb", "lion"))
    learning_rate: float | None = option(
        None, float, "peak learning rate (default: 1e-3 from scratch, else by finetuning_type, full 2e-5)", above=0
    )
    lr_scheduler_type: str = option("cosine", str, "after the warm-up", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = option(0.05, float, "part of the steps with a rising learning rate", least=0, most=1)
    weight_decay: float | None = option(
        None, float, "of matrices, not of vectors (default: 0.1, of adapters 0)", least=0
    )
    max_grad_norm: float = option(1.0, float, "clip the global gradient norm to this; 0: do not clip", least=0)
    seed: int = option(42, int, "of the initial weights, the data order and dropout", least=0)
    # Result
    output_dir: str = option("outputs/medqa", str, "folder of the result")
    logging_steps: int = option(10, int, "optimizer steps between two lines of metrics.jsonl", least=1)
    eval_steps: int = option(200, int, "optimizer steps between two validations; 0: only before and after", least=0)
    save_steps: int = option(500, int, "optimizer steps between two checkpoints", least=1)
    save_total_limit: int | None = option(
        None, int, "keep at most so many checkpoints; the newest and the best stay in any case (default: all)", least=1
    )
    load_best_model_at_end: bool = option(
        False, bool, "save each evaluation that is the best so far; the result is the model of the best one"
    )
    early_stopping_patience: int | None = option(
        None, int, "end after so many evaluations in a row that do not improve the validation loss", least=1
    )
    report_to: tuple[str, ...] = option(
        ("none",),
        str,
        "trackers that get the numbers of metrics.jsonl, never texts or paths",
        choices=("wandb", "tensorboard", "trackio", "none"),
        many=True,
    )
    resume: str | None = option(
        None, str, "checkpoint folder, or an output_dir: its newest checkpoint; the run's own options hold"
    )
    export: bool = option(True, bool, "write the result as a Hugging Face folder, else as a last checkpoint")

    @property
    def is_adapter(self) -> bool:
        return self.finetuning_type != "full"

    def resolved(self, device_type: str) -> "Options":
        """With the defaults that depend on the device and on the kind of start filled in.

        Not filled in is what is chosen later: the stage, and with `auto` all of `PLACED`.
        """
        is_pretrained = self.model_name_or_path is not None
        usual_rate = zerolite.adapters.PRESETS[self.finetuning_type].learning_rate if is_pretrained else 1e-3
        usual_decay = 0.0 if self.is_adapter else 0.1
        usual = {} if self.auto else {"offload": "none", "offload_parameters": False, "gradient_checkpointing": False}
        chosen = {name: value for name, value in usual.items() if getattr(self, name) is None}
        return dataclasses.replace(
            self,
            **chosen,
            precision=self.precision or ("bf16" if device_type == "cuda" else "fp32"),
            num_train_epochs=self.num_train_epochs or (3.0 if is_pretrained else 8.0),
            learning_rate=self.learning_rate or usual_rate,
            weight_decay=usual_decay if self.weight_decay is None else self.weight_decay,
        )

    def check_adapter(self) -> None:
        """ValueError for options that do not go together with the finetuning_type."""
        own = LORA if self.finetuning_type == "lora" else PROMPT if self.is_adapter else []
        for name in (*LORA, *PROMPT):
            if name not in own and getattr(self, name) != FIELDS[name].default:
                kinds = "lora" if name in LORA else "a prompt method"
                raise ValueError(f"--{name} is part of --finetuning_type {kinds}, got {self.finetuning_type}")
        if self.is_adapter and self.model_name_or_path is None:
            raise ValueError(
                f"--finetuning_type {self.finetuning_type} adapts a pretrained model: name its folder with "
                "--model_name_or_path (`make train` leaves one in outputs/medqa/model)"
            )
        if (self.prompt_init == "text") != (self.prompt_init_text is not None):
            raise ValueError("--prompt_init text and --prompt_init_text go together: expected both or neither")
        if not self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout: expected a number below 1, got {self.lora_dropout}")

    def check_data(self) -> None:
        """Raises ValueError for options about data that do not go together."""
        if self.val_size:
            if self.validation_file:
                raise ValueError("--val_size and --validation_file: expected one of them")
            if not self.train_file:
                raise ValueError("--val_size: is of rows of yours (--train_file); the shipped ones have others")
            check_size(self.val_size)
        of_images.check(self)
        if self.packing and self.is_adapter and self.finetuning_type != "lora":
            raise ValueError(
                f"--packing: virtual tokens of --finetuning_type {self.finetuning_type} stand before a sequence, not "
                "before each row in it"
            )

    def placement(self) -> zerolite.Offload | None:
        """What leaves the device; None: nothing does. ValueError for options that do not go together."""
        chosen = [name for name in OFFLOADED if getattr(self, name) not in (FIELDS[name].default, False)]
        if self.offload in (None, "none"):
            if chosen:
                raise ValueError(f"--{chosen[0]} is part of offloading, which is off: add --offload cpu")
            return None
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"--offload_parameters: expected --stage 3, which shards parameters, got {self.stage}")
        if self.offload_parameters and self.offload_budget is not None:
            raise ValueError("--offload_parameters and --offload_budget: expected one of them, since all units leave")
        if self.offload_budget is not None and re.fullmatch(r"\s*[\d.]*\s*", self.offload_budget):
            raise ValueError(f"--offload_budget {self.offload_budget}: expected a unit, such as 20GiB or 512MiB")
        if self.offload_path is not None and not Path(self.offload_path).is_dir():
            raise ValueError(f"--offload_path {self.offload_path}: expected a folder on a local drive, there is none")
        try:
            details = {name.removeprefix("offload_"): getattr(self, name) for name in OFFLOADED}
            return zerolite.Offload(**details | {"parameters": bool(self.offload_parameters)})
        except ValueError as error:
            raise ValueError(f"--offload_budget: {error}") from None

    def check_evaluations(self) -> None:
        """ValueError for options that need evaluations between the first step and the last, where there are none."""
        has_rows = not self.train_file or self.validation_file or self.val_size
        lacking = "--validation_file or --val_size" if not has_rows else "--eval_steps above 0, got 0"
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, name) and not (has_rows and self.eval_steps):
                raise ValueError(f"--{name} chooses by validation losses: expected {lacking}")
        if self.load_best_model_at_end and not self.export:
            raise ValueError("--load_best_model_at_end writes the best model as the result: expected --export")

    def to_yaml(self) -> str:
        """The options as a file that `--config` reads."""
        return _yaml(dataclasses.asdict(self))

    def told(self, device_type: str) -> str:
        """Lines of these resolved options: those that a run which names none of them would not have."""
        usual = Options(model_name_or_path=self.model_name_or_path, finetuning_type=self.finetuning_type)
        usual = dataclasses.replace(usual.resolved(device_type), stage=2)
        changed = {
            k: v for k in ("model_name_or_path", "finetuning_type") if (v := getattr(self, k)) != FIELDS[k].default
        }
        changed |= {k: v for k, v in dataclasses.asdict(self).items() if v != getattr(usual, k)}
        return f"options that are not the defaults (options.yaml has all):\n{_yaml(changed) if changed else ''}"


def _yaml(values: dict) -> str:
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


FIELDS = {field.name: field for field in dataclasses.fields(Options)}
OFFLOADED = [name for name in FIELDS if name.startswith("offload_")]
PLACED = ("stage", "offload", "offload_parameters", "gradient_checkpointing")  # what --auto chooses
LORA = [name for name in FIELDS if name.startswith("lora")] + ["use_rslora", "use_dora", "export_merged"]
PROMPT = [name for name in FIELDS if name.startswith("prompt_")] + ["num_virtual_tokens"]


def parse(argv: list[str]) -> Options:
    """Options from a command line (without the program's name).

    `--resume` without `--config` reads the options of the run that it goes on with, from the folder that it names.
    With `--auto` beside it, what --auto chooses is chosen anew.
    `--offload none` here also takes back the file's offload options, `--num_train_epochs` its max_steps. `--help`
    prints and leaves with status 0.
    Raises ValueError for an unknown option, one without its value, a value out of range, options that do not go
    together, and an unreadable `--config`.
    """
    parser = _Parser(
        prog="train_medqa.py",
        description="Fine-tune a causal language model on medical questions and answers, sharded over the ranks.",
        epilog="No output of a trained model is medical advice.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of options; the command line wins", default=argparse.SUPPRESS)
    for name, field in FIELDS.items():
        shape = {"nargs": "+"} if field.metadata["many"] else {}
        if field.metadata["kind"] is bool:
            shape = {"action": argparse.BooleanOptionalAction}
        elif field.metadata["choices"]:
            shape["metavar"] = "{" + ",".join(map(str, field.metadata["choices"])) + "}"
        usual = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        default = "" if usual is None else f" (default: {usual})"
        help_text = field.metadata["help"].replace("%", "%%") + default
        parser.add_argument(f"--{name}", help=help_text, default=argparse.SUPPRESS, **shape)
    known, unknown = parser.parse_known_args(names.ours_on_command_line(argv, [*FIELDS, "config"]))
    if unknown:
        raise ValueError(names.unknown(unknown[0], [f"--{name}" for name in (*FIELDS, "config")]))
    given = vars(known)
    values: dict = {}
    if "config" in given:
        values = read_config(given.pop("config"))
    elif given.get("resume") and (file := options_file(Path(given["resume"]))) is not None:
        values = {**read_config(file), "output_dir": str(file.parent)}  # it may have been moved since
        if given.get("auto"):
            values = {name: value for name, value in values.items() if name not in PLACED}
    if given.get("offload") == "none":
        values = {name: value for name, value in values.items() if name not in OFFLOADED}
    if "num_train_epochs" in given:
        values.pop("max_steps", None)
    values.update({name: checked(f"--{name}", FIELDS[name], value) for name, value in given.items()})
    options = Options(**values)
    options.placement()
    options.check_adapter()
    options.check_evaluations()
    options.check_data()
    if options.columns is not None:
        columns_of(options.columns)
        if not (options.train_file or options.validation_file):
            raise ValueError("--columns is about files of yours: name them with --train_file or --validation_file")
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}: see --help")


def options_file(resumed: Path) -> Path | None:
    """The options of the run that left this output folder or checkpoint; None where it has none beside it."""
    parents = [resumed.resolve().parent] if re.fullmatch(r"checkpoint-\d+", resumed.resolve().name) else []
    return next((folder / OPTIONS for folder in (resumed, *parents) if (folder / OPTIONS).is_file()), None)


def read_config(path: str | Path) -> dict:
    """Values of a YAML file by option, checked. Raises ValueError, with the file, as `parse` does."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"--config {path}: expected a YAML file, got a folder, a pipe or a device")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected `name: value` lines, got {type(values).__name__}")
    values = names.ours_in_file(values, FIELDS, f"--config {path}")
    for name in values:
        if name not in FIELDS:
            raise ValueError(f"--config {path}: {names.unknown(str(name), list(FIELDS))}")
    return {name: checked(f"{path}: {name}", FIELDS[name], value) for name, value in values.items()}
