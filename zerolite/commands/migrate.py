"""`zerolite migrate FILE`: a configuration of DeepSpeed, Accelerate or FSDP as lines to write; every key is told."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zerolite.commands import from_accelerate, from_deepspeed
from zerolite.commands.command_line import BAD, OK, Parser, print_json, run, shown, table
from zerolite.commands.recipe import Recipe, note
from zerolite.foreign import configuration
from zerolite.foreign.configuration import IDLE, NONE, UNKNOWN, USED, Configuration, Key
from zerolite.foreign.keys import KNOWN

TOLD = """\
The file is one of
  a DeepSpeed configuration   ds_config.json, with values "auto" or without
  an accelerate config        ~/.cache/huggingface/accelerate/default_config.yaml, of DeepSpeed, FSDP or DDP
  an FSDP section             the fsdp_config of TrainingArguments, alone or beside fsdp

It prints the lines of a plain PyTorch loop, zero=dict(...) for the integrations with other trainers, the torchrun
command, and what became of every key: used, not needed, no counterpart, or unknown. Nothing is written or run.

  zerolite migrate ds_config.json
  zerolite migrate default_config.yaml --json | jq .keys

exit status: 0 every key has a counterpart or needs none, 1 some have none (the lines are printed all the same),
2 the file cannot be read or is none of these.
Checkpoints: DeepSpeed's global_step* and FSDP's folders are not read. Convert the weights with their own tool to
safetensors, which zerolite.load_pretrained opens; optimizer states start anew.
"""
ORDER = {
    NONE: "No counterpart (nothing in the lines above stands for these)",
    UNKNOWN: "Unknown (not read)",
    USED: "Used",
    IDLE: "Not needed",
}
ACCELERATE = ("distributed_type", "compute_environment", "deepspeed_config")


def main(argv: Sequence[str] | None = None) -> int:
    return run("migrate", migrate, argv)


def migrate(argv: Sequence[str]) -> int:
    """Raises ValueError for a file that is none of the known ones."""
    parser = Parser("migrate", "A configuration of DeepSpeed, Accelerate or FSDP as the lines to write.", TOLD)
    parser.add_argument("file", type=Path, help="JSON or YAML")
    parser.add_argument("--json", action="store_true", help="lines and keys as JSON")
    given = parser.parse_args(argv)
    values = configuration.read(given.file)
    try:
        recipe, keys = read(values, given.file)
    except ValueError as error:
        raise ValueError(error if str(given.file) in str(error) else f"{given.file}: {error}") from error
    if given.json:
        print_json(_as_json(given.file, recipe, keys))
    else:
        print(_as_text(given.file, recipe, keys))
    return BAD if any(key.status in (NONE, UNKNOWN) for key in keys) else OK


def read(values: dict[str, Any], path: Path) -> tuple[Recipe, list[Key]]:
    """The lines, and what became of every key. ValueError for a configuration of none of the known kinds."""
    recipe = Recipe("a DeepSpeed configuration")
    if any(name in values for name in ACCELERATE):
        values = (
            {**values, "fsdp_config": _unprefixed(values.get("fsdp_config"))} if "fsdp_config" in values else values
        )
        config = Configuration(values)
        more = from_accelerate.read(config, recipe, path)
        return recipe, [*config.keys(), *more]
    if "fsdp" in values or "fsdp_config" in values or _is_fsdp(values):
        section = values.get("fsdp_config") if "fsdp_config" in values else {} if "fsdp" in values else values
        rest = {name: value for name, value in values.items() if section is not values and name != "fsdp_config"}
        config = Configuration({**rest, "fsdp_config": _unprefixed(section)})
        from_accelerate.read_section(config, recipe)
        return recipe, config.keys()
    if not any(name in {key.split(".")[0] for key in KNOWN} for name in values):
        raise ValueError(
            "expected a DeepSpeed configuration, an accelerate config or an FSDP section; its keys are "
            f"{', '.join(shown(name, 30) for name in list(values)[:5])}"
        )
    config = Configuration(values)
    from_deepspeed.read(config, recipe)
    return recipe, config.keys()


def _is_fsdp(values: dict[str, Any]) -> bool:
    """Whether all keys are of an FSDP section, with or without their prefix."""
    nested = [name for name, value in values.items() if isinstance(value, dict) and "xla" not in str(name)]
    return not nested and all(f"fsdp_config.{str(name).removeprefix('fsdp_')}" in KNOWN for name in values)


def _unprefixed(section: Any) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise ValueError(f"fsdp_config: expected a mapping, got {shown(section, 30)}")
    return {str(name).removeprefix("fsdp_"): value for name, value in section.items()}


def _as_text(path: Path, recipe: Recipe, keys: list[Key]) -> str:
    counts = ", ".join(
        f"{sum(key.status == status for key in keys)} {status}" for status in (USED, IDLE, NONE, UNKNOWN)
    )
    parts = [f"{path}: {recipe.kind}, {len(keys)} keys: {counts}"]
    lines = recipe.lines()
    if recipe.needs_args:
        lines.insert(
            0, '# Values "auto" are of args, transformers\' TrainingArguments: replace them in a loop of your own.'
        )
    parts.append("Lines of a plain loop:\n\n" + "\n".join(f"    {line}".rstrip() for line in lines))
    call = "\n".join(f"    {line}" for line in recipe.integration_lines())
    parts.append(f"With ZeroTrainer of zerolite.integrations.transformers, or Accelerator of .accelerate:\n\n{call}")
    parts.append(f"Start:\n\n    {recipe.command()}")
    if recipe.notes:
        parts.append("Mind:\n\n" + "\n".join(note(text) for text in recipe.notes))
    for status, title in ORDER.items():
        rows = [(f"  {shown(key.name)}", _value(key.value), key.told) for key in keys if key.status == status]
        if rows:
            parts.append(f"{title}:\n\n{table(rows)}")
    return "\n\n".join(parts)


def _value(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else json.dumps(value, default=str, ensure_ascii=False)
    return shown(text, 36)


def _as_json(path: Path, recipe: Recipe, keys: list[Key]) -> dict[str, Any]:
    return {
        "file": str(path),
        "kind": recipe.kind,
        "lines": recipe.lines(),
        "zero": recipe.integration(),
        "command": recipe.command(),
        "notes": recipe.notes,
        "keys": [key._asdict() for key in keys],
    }


if __name__ == "__main__":
    sys.exit(main())
