"""`zerolite consolidate CHECKPOINT OUT`: a checkpoint as a Hugging Face folder, without ranks and without a GPU."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from zerolite.checkpoint.manifest import MANIFEST
from zerolite.commands.command_line import OK, Parser, bytes_told, print_json, run

TOLD = """\
OUT gets config.json, sharded safetensors and, where they lie beside the checkpoint, the tokenizer's files:
AutoModelForCausalLM.from_pretrained(OUT) opens it. It is what zerolite.export writes of the same model, bit for bit.
Host memory has one file (2 GiB) and one parameter at most, or a layer where transformers converts weights. OUT appears
when it is whole, and is not replaced.

  zerolite consolidate outputs/medqa/checkpoint-100 tuned
  zerolite consolidate step-1000 tuned --dtype fp32        # the fp32 masters, not what they round to
  zerolite consolidate step-1000 tuned --config base       # of a checkpoint that recorded no configuration

The tokenizer is that of --config, of the checkpoint's folder, or of its run: model/ beside it, or what options.yaml of
train_medqa.py names.

exit status: 0 it is written, 1 the checkpoint is broken (the error names the file), 2 it cannot be written.
"""
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
WHOLE = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def main(argv: Sequence[str] | None = None) -> int:
    return run("consolidate", consolidate, argv)


def consolidate(argv: Sequence[str]) -> int:
    """Raises what `zerolite.checkpoint.consolidate` raises."""
    parser = Parser("consolidate", "A checkpoint as a Hugging Face folder, on one process.", TOLD)
    parser.add_argument("checkpoint", type=Path, help="a folder that zerolite.save wrote")
    parser.add_argument("out", type=Path, help="a folder that does not exist")
    parser.add_argument("--config", type=Path, metavar="FOLDER", help="whose config.json to use, not the recorded one")
    parser.add_argument("--dtype", choices=[*DTYPES], help="of all parameters (default: those that the model had)")
    parser.add_argument("--json", action="store_true", help="what was written, as JSON")
    given = parser.parse_args(argv)
    _check(given)
    tokenizer = _tokenizer(given)
    import torch  # after what can be told without it

    module = importlib.import_module("zerolite.checkpoint.consolidate")
    dtype = getattr(torch, DTYPES[given.dtype]) if given.dtype else None
    written = module.consolidate(given.checkpoint, given.out, given.config, dtype, tokenizer)
    source = str(tokenizer[0].parent) if tokenizer else None
    if given.json:
        print_json(
            {
                "folder": str(given.out),
                "num_parameters": written.num_parameters,
                "num_files": written.num_files,
                "bytes": written.num_bytes,
                "dtype": str(written.dtype),
                "has_config": written.has_config,
                "tokenizer": source,
            }
        )
        return OK
    files = f"{written.num_files} {'file' if written.num_files == 1 else 'files'}"
    print(
        f"{given.out}: {written.num_parameters} parameters in {files}, {bytes_told(written.num_bytes)}, {written.dtype}"
    )
    print("config: config.json is written" if written.has_config else "config: none, the model is not of transformers")
    print(
        f"tokenizer: copied from {source}" if source else "tokenizer: none lies beside the checkpoint; copy one there"
    )
    return OK


def _check(given: argparse.Namespace) -> None:
    """ValueError for what can be told before torch is imported."""
    if not given.checkpoint.is_dir():
        raise ValueError(
            f"{given.checkpoint}: is {'a file' if given.checkpoint.exists() else 'not there'}, expected a checkpoint"
        )
    if not (given.checkpoint / MANIFEST).is_file():
        inner = sorted(path.parent for path in given.checkpoint.glob(f"*/{MANIFEST}"))
        hint = f"; name one of {', '.join(map(str, inner[:4]))}" if inner else ""
        raise ValueError(f"{given.checkpoint}: holds no {MANIFEST}, so it is no checkpoint of zerolite.save{hint}")
    if given.out.exists() or given.out.is_symlink():
        raise ValueError(f"{given.out}: exists; name a folder that does not")
    if given.config is not None and not (given.config / "config.json").is_file():
        raise ValueError(f"--config {given.config}: holds no config.json")


def _tokenizer(given: argparse.Namespace) -> list[Path]:
    """The files of the first folder that holds a whole tokenizer."""
    run_folder = given.checkpoint.resolve().parent
    folders = [
        *filter(None, [given.config]),
        given.checkpoint,
        run_folder,
        run_folder / "model",
        *_of_options(run_folder),
    ]
    for folder in folders:
        if any((folder / name).is_file() for name in WHOLE):
            return [folder / name for name in TOKENIZER if (folder / name).is_file()]
    return []


def _of_options(run_folder: Path) -> list[Path]:
    """Folders that the options of a run name: its tokenizer's, its base's."""
    try:
        found = importlib.import_module("yaml").safe_load((run_folder / "options.yaml").read_text(encoding="utf-8"))
    except Exception:  # no such file, or one that is none of ours: the tokenizer is said to be missing
        return []
    names = (
        [found.get(name) for name in ("tokenizer_name_or_path", "model_name_or_path")]
        if isinstance(found, dict)
        else []
    )
    return [Path(name) for name in names if isinstance(name, str) and Path(name).is_dir()]


if __name__ == "__main__":
    sys.exit(main())
