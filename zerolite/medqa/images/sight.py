"""What a model's folder makes of images: how many tokens stand for one, and the tensors that the model is given.

The image processor of the folder is used, with its code on Pillow, so that every machine computes the same numbers.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoProcessor, PretrainedConfig, PreTrainedTokenizerBase

from zerolite.medqa.images.files import ImageFile

if TYPE_CHECKING:
    from PIL import Image

FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
GRID = "image_grid_thw"  # of processors whose images are as many patches as they have room for

# How the model of a tokenizer sees; and models that run their tower in every forward pass, so that ranks run alike.
SIGHTS: WeakKeyDictionary[PreTrainedTokenizerBase | nn.Module, Sight] = WeakKeyDictionary()


def is_seeing(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a model that reads images."""
    return getattr(config, "vision_config", None) is not None and _token_id(config) is not None


def _token_id(config: PretrainedConfig) -> int | None:
    return getattr(config, "image_token_id", None)


def look(folder: Path, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Sight | None:
    """Let conversations of this tokenizer have images, where the model reads some; its files are read as one comes."""
    if not is_seeing(config):
        return None
    SIGHTS[tokenizer] = Sight(folder, tokenizer, config)
    return SIGHTS[tokenizer]


def sight_of(tokenizer: PreTrainedTokenizerBase) -> Sight:
    """How the model of this tokenizer sees. ValueError where it reads texts alone."""
    if tokenizer not in SIGHTS:
        raise ValueError("this model reads texts alone, and the row has images")
    return SIGHTS[tokenizer]


def begin(model: nn.Module, tokenizer: PreTrainedTokenizerBase, stage: int) -> None:
    """Ask the model whether it reads what its folder's processor gives. Every rank must call it. See `Sight.check`."""
    sight = sight_of(tokenizer)
    sight.check(model)
    if stage == 3:
        SIGHTS[model] = sight


class Sight:
    """The image processor of a model's folder."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig):
        self.folder = folder
        self.config = config
        self.token_id: int = config.image_token_id
        self.token: str = str(tokenizer.convert_ids_to_tokens(self.token_id))
        self.is_known = tokenizer.convert_tokens_to_ids(self.token) == self.token_id
        self._num_tokens: dict[tuple[int, int], int] = {}

    @functools.cached_property
    def processor(self) -> Any:
        """The image processor. ValueError where there is none, or where it is of another model."""
        if not any((self.folder / name).is_file() for name in FILES[:2]):
            raise ValueError(f"{self.folder}: holds no image processor ({FILES[0]}), which images need")
        try:
            found = AutoImageProcessor.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
        except ImportError as error:
            raise ValueError(f"{self.folder}: its image processor needs a package: {_first_line(error)}") from error
        except Exception as error:  # transformers raises whatever a wrong value happens to hit
            raise ValueError(f"{self.folder}: its image processor cannot be used: {_first_line(error)}") from error
        self._check(found)
        return found

    def _check(self, processor: Any) -> None:
        """ValueError where configuration and processor are of two models."""
        if not self.is_known:
            raise ValueError(f"{self.folder}: the tokenizer has no token {self.token_id}, which stands for images")
        vision = self.config.vision_config
        expected = {
            "merge_size": getattr(vision, "spatial_merge_size", None),
            "patch_size": getattr(vision, "patch_size", None),
            "temporal_patch_size": getattr(vision, "temporal_patch_size", None),
        }
        for name, value in expected.items():
            there = getattr(processor, name, None)
            is_told = name == "merge_size" or (isinstance(there, int) and isinstance(value, int))
            if is_told and there != value:
                raise ValueError(
                    f"{self.folder}: the image processor is of another model: {name} is {there} there, {value} here"
                )
        side, crop = getattr(vision, "image_size", None), getattr(processor, "crop_size", None)
        if expected["merge_size"] is None and crop and side and (crop["height"], crop["width"]) != (side, side):
            raise ValueError(
                f"{self.folder}: the image processor is of another model: it gives {crop['height']} x {crop['width']} "
                f"pixels, the model reads {side} x {side}"
            )

    @functools.cached_property
    def _whole_processor(self) -> Any:
        """What counts the tokens of images that are no grid."""
        try:
            return AutoProcessor.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except ImportError as error:
            raise ValueError(f"{self.folder}: its processor needs a package: {_first_line(error)}") from error
        except Exception as error:  # as above
            raise ValueError(f"{self.folder}: its processor cannot be used: {_first_line(error)}") from error

    def num_tokens(self, file: ImageFile) -> int:
        """How many tokens stand for an image: by its size alone."""
        size = file.width, file.height
        if size not in self._num_tokens:
            from PIL import Image

            self._num_tokens[size] = self._count(Image.new("RGB", size))
        return self._num_tokens[size]

    def _count(self, image: Image.Image) -> int:
        values = self._tensors([image])
        if GRID in values:
            return int(values[GRID][0].prod()) // self.processor.merge_size**2
        try:
            found = self._whole_processor(text=[self.token], images=[image], add_special_tokens=False)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.folder}: its processor cannot be used: {_first_line(error)}") from error
        ids = list(found["input_ids"][0])
        if set(ids) != {self.token_id} or set(found) - {"input_ids", "attention_mask", "pixel_values"}:
            raise ValueError(
                f"{self.folder}: {type(self._whole_processor).__name__} writes more than {self.token} for an image, or "
                "gives more than its pixels; what is read are images as LLaVA, Qwen2-VL and GLM-4V have them"
            )
        return len(ids)

    def _tensors(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        try:
            return dict(self.processor(images=images, return_tensors="pt"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.folder}: its image processor refuses an image: {_first_line(error)}") from error

    def inputs(self, files: Sequence[ImageFile], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a model is given beside `input_ids` (rows, tokens) that have `files`, row after row."""
        return self._beside(self._tensors([file.image() for file in files]), input_ids)

    def _beside(self, values: dict[str, torch.Tensor], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if GRID in values:  # positions of Qwen2-VL and GLM-4V go by it: 1 is a token of an image
            values["mm_token_type_ids"] = (input_ids == self.token_id).int()
        return values

    @functools.cached_property
    def _blank(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(tokens, tensors) of a small image."""
        from PIL import Image

        image = Image.new("RGB", (32, 32))
        return self._count(image), self._tensors([image])

    def with_blank(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch without images, with one more row: an image that nothing is learned from.

        At stage 3 every rank gathers what another one does. The row has no label, so no gradient comes of it.
        """
        num_tokens, values = self._blank
        ids = torch.full((1, num_tokens), self.token_id)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
        pads = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        longest = max(num_tokens, batch["input_ids"].shape[1])
        found = {
            name: torch.cat([_padded(batch[name], longest, pad), _padded(row[name], longest, pad)])
            for name, pad in pads.items()
        }
        return found | self._beside(dict(values), found["input_ids"])

    def write(self, folder: Path) -> None:
        """Copy the files of the processor to a result."""
        for name in FILES:
            if (self.folder / name).is_file() and self.folder.resolve() != folder.resolve():
                shutil.copyfile(self.folder / name, folder / name)

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Have the model read a small image. Every rank must call it.

        Raises ValueError where it cannot: the processor is of another model.
        """
        device = next(model.parameters()).device
        ids = torch.zeros((1, 1), dtype=torch.int64)
        batch = self.with_blank({"input_ids": ids, "attention_mask": ids + 1, "labels": ids - 100})
        del batch["labels"]
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            model(**{name: values.to(device) for name, values in batch.items()}, use_cache=False, logits_to_keep=1)
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            raise ValueError(
                f"{self.folder}: the model does not read what its image processor gives; is it of another model? "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error
        finally:
            for module in training:
                module.training = True


def _padded(values: torch.Tensor, length: int, pad: int) -> torch.Tensor:
    return nn.functional.pad(values, (0, length - values.shape[1]), value=pad)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
