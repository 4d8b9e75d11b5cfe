"""What Lightning keeps in a checkpoint beside parameters and states: loops, callbacks, schedulers, hyperparameters.

Its values are any that `torch.save` takes. They lie as bytes in the zerolite checkpoint, under its hashes, and are read
with weights_only=True, which builds tensors and plain containers and runs no code.
"""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _load

from zerolite.errors import CheckpointError

KEY = "lightning"


def dumped(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`state` as an `extra` of zerolite.save. CheckpointError for what could not be read again, with its key."""
    for key, value in state.items():
        try:
            _load(io.BytesIO(_bytes(value)), weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{key!r} could be written, and not read again with weights_only=True: keep plain values, tensors and "
                "containers of them in a checkpoint, or allow the class by torch.serialization.add_safe_globals "
                f"({error})"
            ) from error
    return {KEY: torch.frombuffer(bytearray(_bytes(state)), dtype=torch.uint8)}


def _bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def read(extra: Any, folder: Path, weights_only: bool | None) -> dict[str, Any]:
    """What `dumped` was given. CheckpointError where the checkpoint was not written by Lightning."""
    if not isinstance(extra, dict) or KEY not in extra:
        raise CheckpointError(
            f"{folder} was written by zerolite.save outside of Lightning, and has nothing of its loops and callbacks: "
            "load it by zerolite.load(trainer.model, folder) in LightningModule.on_fit_start"
        )
    return _load(io.BytesIO(extra[KEY].numpy().tobytes()), weights_only=weights_only is not False)


def local_folder(path: Any) -> Path:
    """CheckpointError for a path of a remote file system, and for a file: checkpoints of others are files."""
    if "://" in str(path):
        raise CheckpointError(f"checkpoints are local folders that all ranks see, got {path}: save there and copy")
    if Path(path).is_file():
        raise CheckpointError(
            f"{path} is a file, and zerolite's checkpoints are folders: one of another strategy has whole weights, "
            "which the module's load_state_dict takes before it is given to the trainer"
        )
    return Path(path)
