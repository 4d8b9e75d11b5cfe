"""Folders that appear whole or not at all: fsync, hashes, and an atomic rename."""

import ctypes
import hashlib
import os
import shutil
import uuid
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2


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
    """Make `written` appear as `folder` in one step, durable; what stood there before is removed afterwards."""
    sync_file(written)
    if folder.exists():
        previous = written
        if not _exchange(written, folder):
            previous = beside(folder, f"old-{uuid.uuid4().hex[:12]}")
            os.rename(folder, previous)
            os.rename(written, folder)
        sync_file(folder.parent)
        shutil.rmtree(previous)
        return
    os.rename(written, folder)
    sync_file(folder.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically where the kernel and the file system can (Linux renameat2)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted writing of `folder` left beside it."""
    for path in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
