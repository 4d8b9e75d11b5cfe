"""An output folder belongs to one run: locked while it works, refused where it holds another run's result.

What the end of a run would not be able to write is found here, before any work. On rank 0 alone, which writes; but the
shards of a checkpoint come from all ranks, so all must see one folder.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from zerolite.medqa import resume
from zerolite.medqa.arguments import OPTIONS, Options
from zerolite.medqa.processes import Processes

LOCK = "run.lock"
RESULTS = ("model", "adapter")  # folders that the end of a run replaces
REJECTS = "rejected.jsonl"  # of this run already, when it begins
SIDE_FILES = (
    *("metrics.jsonl", "answers.jsonl", "report.md", "loss.png", "memory.json", "best.json", "trackers.json"),
    *(REJECTS, OPTIONS),
)
# Of a file system that has no locks; NFS has them from version 4 on, or with its lock daemon.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

SEEN_S = 10.0  # for what another machine has written to be seen on this one: a network's file system keeps answers

_locks: dict[Path, int] = {}  # descriptors of this process, which is one run at a time


def claim_output(options: Options) -> str | None:
    """Make the output folder, lock it, and see that this run may and can write there; what to tell about it, if any.

    The lock ends with the process, or with `release`.
    Raises ValueError where the folder cannot be written, where another run works in it, and where it holds what this
    run would replace: a finished result, or checkpoints that it does not go on from. Nothing in it has changed then.
    """
    folder = Path(options.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot be written: {error.strerror}") from error
    told = _lock(folder)
    if _goes_on(options):
        _check_newer(folder, Path(options.resume or ""))
        for left in folder.glob(".checkpoint-*.tmp-*"):  # of a save that was killed: it may never be of a step again
            if ".tmp-old-" not in left.name:  # that one was complete, and `zerolite.load` puts it back
                shutil.rmtree(left, ignore_errors=True)
    else:
        _check_free(folder, options)
    _check_writable(folder)
    return told


def check_shared(folder: Path, ranks: Processes) -> None:
    """See that every rank reads and writes the output folder that rank 0 has claimed. Every rank must call it.

    ValueError on every rank where one of them does not: another machine's disk, another working directory, no right.
    """
    if ranks.world_size == 1:
        return
    token = folder / f".shared-{secrets.token_hex(8)}"
    if ranks.rank == 0:
        token.touch()
    token = folder / ranks.gather_texts(token.name)[0]
    own = f"{folder.resolve()} on {socket.gethostname()}"
    problems = ranks.gather_texts("" if _serves(token) else own)
    if ranks.rank == 0:
        token.unlink(missing_ok=True)
    found = [f"rank {rank} ({text})" for rank, text in enumerate(problems) if text]
    if found:
        raise ValueError(
            f"--output_dir {folder}: {', '.join(found[:4])} cannot write there, or does not see what rank 0 writes: "
            "expected one folder that all machines share, under one path"
        )


def _serves(token: Path) -> bool:
    deadline = time.monotonic() + SEEN_S
    try:
        while not token.exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                os.listdir(token.parent)  # has NFS ask the server again
        with tempfile.TemporaryFile(dir=token.parent):
            return True
    except OSError:
        return False


def begin(options: Options) -> str | None:
    """Write `options.yaml`, now that nothing refuses the run; what to tell about an earlier one, if any.

    The result of an earlier run of another kind, which this one does not replace, is put aside with all that is told
    about it: two results beside each other would share one report.
    """
    folder, told = Path(options.output_dir), None
    if not _goes_on(options) and any((folder / name).exists() for name in RESULTS):
        number = 1
        while (aside := folder / f"earlier-{number}").exists():
            number += 1
        aside.mkdir()
        for name in (*RESULTS, *SIDE_FILES):
            if name != REJECTS and (folder / name).exists():
                (folder / name).rename(aside / name)
        told = f"the result of an earlier run of another kind is now in {aside}"
    text = dataclasses.replace(options, resume=None).to_yaml()
    (folder / OPTIONS).write_text(text, encoding="utf-8")
    return told


def release(folder: Path) -> None:
    """End the lock, and remove its file."""
    descriptor = _locks.pop(folder.resolve(), None)
    if descriptor is not None:
        (folder / LOCK).unlink(missing_ok=True)  # before another can lock it: who waits finds a file without a name
        os.close(descriptor)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The lock ends with this block."""
    try:
        yield
    finally:
        release(folder)


def _lock(folder: Path) -> str | None:
    path = folder / LOCK
    if folder.resolve() in _locks:
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                return f"{folder} cannot be locked ({error.strerror}): see to it that no other run writes there"
            raise ValueError(
                f"--output_dir {folder}: another run works there ({who or 'its lock says no more'}): wait for its end, "
                "or name another folder"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)  # of a run that has just ended
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _locks[folder.resolve()] = descriptor
    return None


def _goes_on(options: Options) -> bool:
    """Whether the run goes on in the folder of the one that it is resumed from."""
    if options.resume is None:
        return False
    path = Path(options.resume).resolve()
    path = path.parent if re.fullmatch(r"checkpoint-\d+", path.name) else path
    return path == Path(options.output_dir).resolve()


def _check_free(folder: Path, options: Options) -> None:
    """ValueError where a run has left something to go on from, or a result that this one would replace."""
    found = resume.checkpoints(folder)
    if found:
        raise ValueError(
            f"--output_dir {folder}: holds {found[-1].name} of an earlier run; go on from it with --resume {folder}, "
            "or name another folder"
        )
    written = ("adapter", "model") if options.export_merged else ("adapter",) if options.is_adapter else ("model",)
    base = Path(options.model_name_or_path or "/").resolve()
    for name in RESULTS:
        is_needed = name in written or base.is_relative_to((folder / name).resolve())
        if (folder / name).exists() and is_needed:
            raise ValueError(
                f"--output_dir {folder}: holds {name} of an earlier run, which this one would replace: name another "
                f"folder, or move it away (mv {folder} {folder}-1)"
            )


def _check_newer(folder: Path, resumed: Path) -> None:
    """ValueError where a checkpoint is named and the folder holds later ones, which this run would mix with its own."""
    path = resumed.resolve()
    later = resume.checkpoints(folder)
    later = later[[one.name for one in later].index(path.name) + 1 :] if path.name in [p.name for p in later] else []
    if path != folder.resolve() and later:
        raise ValueError(
            f"--resume {resumed}: {folder} also holds {', '.join(one.name for one in later[:4])}, from after it, which "
            "would be mixed with this run's: move what is later away, or name another --output_dir"
        )


def _check_writable(folder: Path) -> None:
    """ValueError for what stands where the run is going to write."""
    for name in RESULTS:
        path = folder / name
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: is a file, where the result is to be a folder: move it away")
        inner = sorted(one.name for one in path.iterdir() if one.is_dir()) if path.is_dir() else []
        if inner:
            raise ValueError(
                f"{path}: holds folders ({', '.join(inner[:4])}), which writing the result would remove: move them away"
            )
    for path in (*(folder / name for name in SIDE_FILES), *folder.glob("checkpoint-*")):
        is_checkpoint = path.name.startswith("checkpoint-")
        if path.exists() and (path.is_dir() != is_checkpoint or not os.access(path, os.W_OK)):
            raise ValueError(f"{path}: cannot be written, and the run is going to: move it away")
