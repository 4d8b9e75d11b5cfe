"""Options that do not go together with images."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zerolite.medqa.arguments import Options


def check(options: Options) -> None:
    """Raises ValueError for options that do not go together with `--image_folder`, where that is given."""
    if options.image_folder is None:
        return
    if options.model_name_or_path is None:
        raise ValueError("--image_folder: expected a model that reads images (--model_name_or_path)")
    if not (options.train_file or options.validation_file):
        raise ValueError("--image_folder: is of rows of yours (--train_file); the shipped ones have no images")
    if options.packing or (options.is_adapter and options.finetuning_type != "lora"):
        other = "--packing" if options.packing else f"--finetuning_type {options.finetuning_type}"
        raise ValueError(f"--image_folder and {other}: expected one of them; images have positions of their own")
