"""Folders that appear whole or not at all: fsync, hashes, and an atomic rename."""

import ctypes
import errno
import glob
import hashlib
import os
import shutil
import uuid
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2
OLD = "old-"  # begins the token of a folder that was complete


def sync_file(path: Path) -> None:
    """Have a file's bytes (or a folder's entries) on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def beside(folder: Path, token: str) -> Path:
    """A name next to `folder` for what is being written; no reader looks at it."""
    return folder.with_name(f".{folder.name}.tmp-{token}")


def commit_folder(written: Path, folder: Path) -> None:
    """Make `written` appear as `folder` in one step, durable; what stood there before is removed afterwards.

    FileNotFoundError where somebody has removed `written`, FileExistsError where a file stands in its place.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(errno.EEXIST, "is a file, where a folder is to appear", str(folder))
    sync_file(written)
    previous = None
    if not folder.exists():
        os.rename(written, folder)
    elif _exchange(written, folder):
        previous = written
    else:  # two renames: a crash between them is mended by `restore`
        previous = beside(folder, f"{OLD}{uuid.uuid4().hex[:12]}")
        os.rename(folder, previous)
        try:
            os.rename(written, folder)
        except OSError:
            os.rename(previous, folder)
            raise
    sync_file(folder.parent)
    if previous is not None:
        shutil.rmtree(previous, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically where the kernel and the file system can (Linux renameat2)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0


def restore(folder: Path) -> None:
    """Put back what a `commit_folder` that died between its two renames had put aside."""
    if not folder.exists():
        for previous in _beside(folder, OLD):
            os.rename(previous, folder)
            return


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted writing of `folder` left beside it."""
    for path in _beside(folder, ""):
        shutil.rmtree(path, ignore_errors=True)


def _beside(folder: Path, prefix: str) -> list[Path]:
    return sorted(folder.parent.glob(glob.escape(f".{folder.name}.tmp-{prefix}") + "*"))
