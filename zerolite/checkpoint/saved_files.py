"""The files of one checkpoint: opened once, so that what is read is what was hashed, whoever replaces the folder.

[Note: one version]
A saver may exchange the folder at any moment. So the folder is opened first, the manifest and every file are opened
inside of that, and each file is hashed, checked and read through one descriptor: by its name below /proc/self/fd, which
leads to the same file whatever has happened to its path. A file that the saver removes in between is missing, an error.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from zerolite.checkpoint import structure
from zerolite.checkpoint.manifest import MANIFEST, parse_manifest
from zerolite.checkpoint.structure import SavedSlice
from zerolite.errors import CheckpointError
from zerolite.runtime import atomic_dir as files


class SavedFolder:
    """A checkpoint's manifest and, once `open_files` has checked them, its tensors."""

    manifest: dict[str, Any]
    digest: str  # of the manifest, so of all that it has hashes of
    slices: dict[str, list[tuple[SavedSlice, Any]]]  # by key, in order; each with its file's handle

    def __init__(self, folder: Path, framework: str = "pt"):
        """framework: of safetensors, in which tensors come; "numpy" reads what files hold without importing torch."""
        self.folder, self.framework = folder, framework
        self.handles: list[Any] = []  # by saved rank
        self._open = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._open.close()

    def open(self) -> str:
        """Open the folder and read its manifest; the manifest's SHA-256. CheckpointError where it is no checkpoint."""
        what = "does not exist"
        try:
            self._directory = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            self._open.callback(os.close, self._directory)
            what = "holds no manifest.json"
            with self._descriptor(MANIFEST) as descriptor, open(descriptor, "rb", closefd=False) as file:
                data = file.read()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(
                f"{self.folder} {what}, so it is no complete checkpoint: name one that zerolite.save wrote"
            ) from error
        self.manifest = parse_manifest(data, self.folder / MANIFEST)
        structure.check_manifest(self.manifest)
        self.digest = self.manifest["sha256"]
        return self.digest

    def open_files(self, rank: int, world_size: int) -> None:
        """Open every file and check its structure; of `world_size` ranks each hashes its share.

        CheckpointError for a file that is missing, no plain file, altered, or not of the structure that `save` writes.
        """
        found: dict[str, list[tuple[SavedSlice, Any]]] = {}
        for index, (name, entry) in enumerate(sorted(self.manifest["files"].items())):
            path = self.folder / name
            try:
                with self._descriptor(name) as descriptor:
                    self._check_bytes(descriptor, path, entry, index % world_size == rank)
                    handle = self._open.enter_context(safe_open(_path_of(descriptor), framework=self.framework))
            except FileNotFoundError as error:
                raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, use another one") from error
            except SafetensorError as error:
                raise CheckpointError(f"{path} is no safetensors file ({error}): use another checkpoint") from error
            self.handles.append(handle)
            for key, part in structure.slices_of_file(handle, path, self.manifest).items():
                found.setdefault(key, []).append((part, handle))
        self.slices = {key: sorted(parts, key=lambda part: part[0]) for key, parts in found.items()}
        structure.check_cover({key: [part[0] for part in parts] for key, parts in self.slices.items()}, self.manifest)

    def of_rank(self, rank: int):
        """The handle of a rank's own file, or of rank 0's for one beyond the saved world."""
        return self.handles[rank if rank < len(self.handles) else 0]

    def of_buffer(self, rank: int, name: str):
        """The handle of the file that has a rank's buffer: its own or, of another pipeline stage, the first with it."""
        key = f"buffer/{name}"
        for handle in (self.of_rank(rank), *self.handles):
            if key in handle.keys():
                return handle
        raise CheckpointError(f"{self.folder} holds no {key}: the checkpoint is incomplete, use another one")

    def extra_of_rank(self, rank: int) -> tuple[Any, Any]:
        """What a rank saved as `extra`, packed as JSON, and the handle that has its tensors."""
        handle = self.of_rank(rank)
        return structure.parse_json(handle.metadata()["extra"], "extra values"), handle

    @contextlib.contextmanager
    def _descriptor(self, name: str) -> Iterator[int]:
        """A plain file of the folder, opened without following a link and without waiting for a FIFO's writer."""
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._directory)
        except OSError as error:
            if os.path.islink(self.folder / name):
                raise CheckpointError(f"{self.folder / name} is a link: copy the file itself there") from error
            raise
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"{self.folder / name} is no plain file: use another checkpoint")
            yield descriptor
        finally:
            os.close(descriptor)

    @staticmethod
    def _check_bytes(descriptor: int, path: Path, entry: dict, hashes: bool) -> None:
        size = os.fstat(descriptor).st_size
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{path} has {size} bytes, the manifest says {entry['bytes']}: it was truncated or altered, use "
                "another checkpoint"
            )
        if hashes and files.sha256_of(_path_of(descriptor)) != entry["sha256"]:
            raise CheckpointError(f"{path} was altered (its SHA-256 is not the manifest's): use another checkpoint")


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}")
