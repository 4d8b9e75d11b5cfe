"""Image files: found inside one folder, of known formats, of bounded size, decoded whole before they are used.

Pillow decodes them. It is asked for raster formats alone: others may start programs.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from zerolite.medqa.rows import shown

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 89_478_485  # of an image: what Pillow warns of, 256 MiB of RGB
MAX_ASPECT = 200  # the longer side over the shorter: processors of Qwen2-VL's kind refuse more


@dataclass(frozen=True)
class ImageFile:
    """A file that holds an image."""

    path: Path = field(compare=False)
    width: int
    height: int
    digest: str  # of the file's bytes

    def image(self) -> Image.Image:
        """Its pixels as RGB, turned as the camera was. Raises ValueError where the file has changed since."""
        found, content = _decoded(self.path)
        if _digest(content) != self.digest:
            raise ValueError(f"image {self.path}: has changed since it was read first")
        return found


def inside(folder: Path, name: object) -> Path:
    """The file that a row names. Raises ValueError for a name that leaves the folder, or that is no file's."""
    if isinstance(name, dict):
        raise ValueError(
            f"image: expected a file name, got an object with {shown(sorted(map(str, name)))}: write files"
        )
    if not isinstance(name, str) or not name.strip() or "\x00" in name:
        raise ValueError(f"image: expected a file name, got {shown(name)}")
    if name.startswith(("http://", "https://", "data:", "file:")):
        raise ValueError(f"image {shown(name)}: expected a file name below --image_folder; nothing is downloaded")
    path = folder / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image {name}: leaves the folder {folder}: expected a file below it")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(f"image {name}: {what}, in {folder}")
    return path


def read(path: Path) -> ImageFile:
    """A file, decoded once. Raises ValueError where it is no image, is damaged, too large, or not of 8 bits."""
    found, content = _decoded(path)
    return ImageFile(path, *found.size, _digest(content))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _decoded(path: Path) -> tuple[Image.Image, bytes]:
    """(the image, the file's bytes)."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError:
        raise ValueError("images need Pillow: pip install 'zerolite[vision]'") from None
    import io

    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"image {path}: cannot be read: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its size, which is looked at here, and of odd metadata
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
            _check(path, opened)
            return ImageOps.exif_transpose(opened).convert("RGB"), content
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        if isinstance(error, UnidentifiedImageError):
            raise ValueError(f"image {path}: is {_kind(content)}, expected one of {', '.join(FORMATS)}") from None
        raise ValueError(f"image {path}: has more than {MAX_PIXELS:,} pixels: make it smaller") from None
    except ValueError as error:
        raise error if str(error).startswith("image ") else ValueError(f"image {path}: is damaged: {error}") from None
    except (OSError, SyntaxError, EOFError, IndexError, OverflowError, MemoryError) as error:
        raise ValueError(f"image {path}: is damaged: {error}") from None


def _check(path: Path, opened: Image.Image) -> None:
    """By what stands in the file's head, before it is decoded."""
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"image {path}: has {width} x {height} pixels, expected at most {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"image {path}: has {width} x {height} pixels: one side is over {MAX_ASPECT} times the other")
    if opened.mode.startswith(("I", "F")):
        raise ValueError(
            f"image {path}: has more than 8 bits a channel (mode {opened.mode}), where high values would be cut off: "
            "choose a window and write it with 8 bits"
        )


def _kind(content: bytes) -> str:
    if content[128:132] == b"DICM":
        return "DICOM"
    if content.startswith(b"version https://git-lfs"):
        return "a git LFS pointer (`git lfs pull` fetches the file itself)"
    return "empty" if not content else "no image that can be read"
