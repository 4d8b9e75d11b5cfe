"""What a user names as MODEL: a Hugging Face folder, an adapter on its base, a result or a checkpoint of a run.

Nothing is downloaded, no code of a folder runs and no pickle is read. Every mistake about a folder is a ValueError that
names it.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

import zerolite
from zerolite.medqa import model as models
from zerolite.medqa import processes, resume, template, tuning
from zerolite.medqa.arguments import OPTIONS, parse
from zerolite.medqa.images.sight import look

CONFIG, ADAPTER, MANIFEST = "config.json", "adapter_config.json", "manifest.json"
EXPECTED = (
    "a Hugging Face folder (config.json), an adapter (adapter_config.json), or an output folder of train_medqa.py"
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NUM_SAMPLES, SAMPLE_BYTES = 256, 4096  # of a file of weights, in a print


@dataclass
class Opened:
    """A model that answers."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    folder: Path  # what was opened: of a result its model/ or adapter/
    told: str  # which template, as `template.choose` says it
    room: int  # token ids of a prompt and its answer together
    print: str  # tells folders of other weights apart


def open_model(
    folder: Path,
    base: Path | None = None,
    tokenizer: Path | None = None,
    wanted_template: str | None = None,
    precision: str | None = None,
    stage: int = 0,
) -> Opened:
    """The model in eval mode, on the GPU where there is one, in bf16 there and else in fp32.

    base: of an adapter, in place of the folder that it names. tokenizer: a folder, in place of the model's own one.
    wanted_template, precision: as train_medqa.py's --template and --precision. stage: 0 is the whole model in this
    process; else it is sharded over the ranks, and every rank must call it.
    Raises ValueError for a folder that is none of these, or that cannot be used; what it lacks is named.
    """
    folder = find(folder)
    is_adapter = is_adapter_folder(folder)
    if base is not None and not is_adapter:
        raise ValueError(f"--base {base}: only an adapter has a base; {folder} holds no {ADAPTER}")
    if (folder / MANIFEST).is_file():
        return _open_checkpoint(folder, tokenizer, wanted_template, precision, stage)
    base = base_of(folder, base) if is_adapter else folder
    config = _config(base)
    read, told = _tokenizer(tokenizer, folder, base, config, wanted_template)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = models.DTYPES[precision or ("bf16" if device.type == "cuda" else "fp32")]
    how = {"stage": stage, "precision": zerolite.Precision(param=dtype)}
    if stage and not is_adapter:
        model = zerolite.load_pretrained(base.resolve(), **how)
    else:
        model = _read_model(base, config, dtype)
    num_virtual = _load_adapter(model, folder, "default") if is_adapter else 0
    if is_adapter and stage:
        model = zerolite.shard(model, **how)
    weights = [base, folder] if is_adapter else [folder]
    if not stage:
        model = model.to(device)
    return Opened(model.eval(), read, folder, told, _longest(config) - num_virtual, print_of(weights, ADAPTER))


@dataclass
class Variant:
    """One way to use a model that is in memory once: with an adapter, or as its base."""

    opened: Opened
    adapter: str | None  # its name in the model; None: the base
    has_others: bool  # the model has adapters

    @contextlib.contextmanager
    def active(self):
        """Inside, the model answers as this variant; one thread at a time."""
        model = self.opened.model
        with contextlib.ExitStack() as stack:
            if self.adapter is not None:
                zerolite.adapters.use(model, self.adapter)
            elif self.has_others:
                stack.enter_context(zerolite.adapters.disabled(model))
            yield


def open_variants(
    folder: Path,
    adapters: Sequence[Path],
    base: Path | None = None,
    tokenizer: Path | None = None,
    wanted_template: str | None = None,
    precision: str | None = None,
) -> dict[Path | None, Variant]:
    """What can be chosen, by the folders as they are given; None: the base. Each asks in its own folder's template.

    folder: of a base, or of an adapter, which is one of the variants then. The others: as `open_model`.
    Raises ValueError where `open_model` does, and for an adapter that is none of this base.
    """
    found = {path: find_adapter(path) for path in adapters}
    first = open_model(folder, base, tokenizer, wanted_template, precision)
    if (first.folder / MANIFEST).is_file() and found:
        raise ValueError(f"{first.folder}: is a checkpoint; expected a Hugging Face folder below --adapter")
    if not found and not is_adapter_folder(first.folder):
        return {None: Variant(first, None, has_others=False)}
    model, variants = first.model, {}
    of_base = base_of(first.folder, base) if is_adapter_folder(first.folder) else first.folder
    if of_base != first.folder:
        variants[folder] = Variant(first, "default", has_others=True)
    config, device = _config(of_base), next(model.parameters()).device
    read, told = _tokenizer(tokenizer, of_base, of_base, config, wanted_template)
    room = _longest(config)
    for number, (path, inner) in enumerate(found.items()):
        own, told_own = _tokenizer(tokenizer, inner, of_base, config, wanted_template)
        num_virtual = _load_adapter(model, inner, f"adapter_{number}")
        opened = Opened(model, own, inner, told_own, room - num_virtual, print_of([of_base, inner], ADAPTER))
        variants[path] = Variant(opened, f"adapter_{number}", has_others=True)
    variants[None] = Variant(Opened(model, read, of_base, told, room, print_of([of_base])), None, has_others=True)
    model.to(device).eval()
    return variants


def is_adapter_folder(folder: Path) -> bool:
    return (folder / ADAPTER).is_file()


def find_adapter(folder: Path) -> Path:
    """The adapter's folder: `folder`, or adapter/ of a run's result, also beside a merged model."""
    for path in (folder, folder / "adapter"):
        if is_adapter_folder(path):
            return path
    what = "there is no such folder" if not folder.exists() else f"expected an adapter; it holds no {ADAPTER}"
    raise ValueError(f"--adapter {folder}: {what}")


def find(folder: Path) -> Path:
    """The folder to open: `folder`, or what it holds as the result of a run; a merged model before its adapter."""
    if not folder.exists():
        hint = models.fetching(str(folder))
        raise ValueError(f"{folder}: there is no such folder; expected {EXPECTED}; nothing is downloaded{hint}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder: {EXPECTED}")
    for name in (ADAPTER, CONFIG, MANIFEST):
        if (folder / name).is_file():
            return folder
    for inner, name in (("model", CONFIG), ("adapter", ADAPTER)):
        if (folder / inner / name).is_file():
            return folder / inner
    if found := resume.checkpoints(folder):
        return found[-1]
    raise ValueError(f"{folder}: expected {EXPECTED}; it holds none of these")


def base_of(adapter: Path, given: Path | None) -> Path:
    """The base's folder: `given`, or what the adapter's configuration names, from here or from the adapter's folder."""
    named = given
    if named is None:
        try:
            named = json.loads((adapter / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
            found = [path for path in (Path(named), adapter / named) if path.is_dir()]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{adapter}: {ADAPTER} names no base ({error!r}); name it with --base FOLDER") from error
        if not found:
            raise ValueError(
                f"{adapter}: its base {named} is no folder here, and nothing is downloaded; name it with --base FOLDER"
            )
        named = found[0]
    base = find(named)
    if not (base / CONFIG).is_file() or (base / ADAPTER).is_file():
        raise ValueError(f"{base}: expected the base of an adapter, a Hugging Face folder with {CONFIG}")
    return base


def _tokenizer(
    given: Path | None, folder: Path, base: Path, config: PretrainedConfig, wanted_template: str | None
) -> tuple[PreTrainedTokenizerBase, str]:
    """(the given tokenizer, else that of `folder`, else its base's; which chat template)."""
    has_own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    read = models.read_tokenizer(given or (folder if has_own else base))
    told = template.choose(read, wanted_template)
    models.check_vocabulary(read, config)
    look(base, read, config)
    return read, told


def _load_adapter(model: nn.Module, folder: Path, name: str) -> int:
    """Its virtual tokens, which a prompt has no room for."""
    zerolite.adapters.load(model, folder, name)
    return json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("num_virtual_tokens") or 0


def _config(folder: Path) -> PretrainedConfig:
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        got = f"{', '.join(pickles[:3])}, which are pickles and not read" if pickles else "none"
        raise ValueError(
            f"{folder}: expected weights in *.safetensors, got {got}; write the model again with save_pretrained"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a wrong value happens to hit
        raise ValueError(f"{folder}: {CONFIG} cannot be used: {models.cause(error)}") from error
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{folder}: its weights are quantised; expected them in 16 or 32 bits")
    return config


def _longest(config: PretrainedConfig) -> int:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def _read_model(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    try:
        model, info = models.auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # as above
        raise ValueError(f"{folder}: cannot be opened as a causal language model: {models.cause(error)}") from error
    if lacking := sorted(map(str, info["missing_keys"])):
        raise ValueError(f"{folder}: its files lack {', '.join(lacking[:4])}, which would be random numbers")
    return model


def print_of(folders: list[Path], *configs: str) -> str:
    """A fingerprint of the configurations, and of samples of the weights: not of all their bytes, which may be many.

    Samples lie closer than the matrices of a layer are large, so that a base with an adapter merged is another one.
    """
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted([*folder.glob("*.safetensors"), *(folder / n for n in (CONFIG, MANIFEST, *configs))]):
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                size = file.seek(0, 2)
                found.update(f"{path.name} {size}".encode())
                for start in range(0, size, max(SAMPLE_BYTES, size // NUM_SAMPLES)):
                    file.seek(start)
                    found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()[:16]


def _open_checkpoint(
    folder: Path, tokenizer: Path | None, wanted_template: str | None, precision: str | None, stage: int
) -> Opened:
    """Of train_medqa.py, by the options that its run wrote beside it."""
    file = folder.parent / OPTIONS
    if not file.is_file() or not re.fullmatch(r"checkpoint-\d+", folder.name):
        raise ValueError(
            f"{folder}: a checkpoint is opened as checkpoint-N beside its run's {OPTIONS}, which is not there; "
            "train_medqa.py --export writes a folder that can be opened anywhere"
        )
    options = parse(["--config", str(file), "--offload", "none"])
    asked = {"tokenizer_name_or_path": tokenizer and str(tokenizer), "template": wanted_template}
    options = dataclasses.replace(
        options, stage=stage, offload_parameters=False, **{name: value for name, value in asked.items() if value}
    )
    read = models.load_tokenizer(options)
    told = template.choose(read, options.template)
    config = models.load_config(options, read)
    ranks = processes.join()
    options = dataclasses.replace(options, precision=precision).resolved(ranks.device.type)
    model = models.sharded(options, config, tuning.adaptation(options, read))
    zerolite.load(model, folder)
    models.align_ends(model, read)
    num_virtual = 0
    if options.is_adapter and options.finetuning_type != "lora":
        presets = zerolite.adapters.PRESETS
        num_virtual = options.num_virtual_tokens or presets[options.finetuning_type].tokens
    return Opened(model.eval(), read, folder, told, _longest(config) - num_virtual, print_of([folder]))
