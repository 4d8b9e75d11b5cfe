"""manifest.json of a checkpoint: read, checked against its own hash, and written."""

import hashlib
import json
from pathlib import Path

from zerolite.errors import CheckpointError
from zerolite.runtime import atomic_dir as files

MANIFEST = "manifest.json"
FORMAT = "zerolite-checkpoint"
VERSION = 2
PLAIN_VERSION = 1  # of a checkpoint without blocks and stages, which older releases read too
NO_DIGEST = b"0" * 64  # stands in the manifest for its own hash while that is taken


def is_complete(folder) -> bool:
    """Whether `folder` holds a committed checkpoint; hashes are checked by `load`."""
    return (Path(folder) / MANIFEST).is_file()


def parse_manifest(data: bytes, path: Path) -> dict:
    """The manifest in a file's bytes; CheckpointError where it is not one of ours. `path` is for errors."""
    try:
        manifest = json.loads(data)
        if manifest["format"] != FORMAT or manifest["version"] > VERSION:
            raise CheckpointError(
                f"{path} is of format {manifest['format']} {manifest['version']}, this one reads {FORMAT} {VERSION}"
            )
        digest = manifest["sha256"].encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): use another checkpoint") from error
    if data.count(digest) != 1 or hashlib.sha256(data.replace(digest, NO_DIGEST)).hexdigest().encode() != digest:
        raise CheckpointError(f"{path} was altered (its own SHA-256 does not hold): use another checkpoint")
    return manifest


def write_manifest(folder: Path, content: dict) -> None:
    """Write manifest.json of `content` in `folder`, with the format, the version and its own hash."""
    version = VERSION if "mesh" in content else PLAIN_VERSION
    manifest = {"format": FORMAT, "version": version, **content, "sha256": NO_DIGEST.decode()}
    data = json.dumps(manifest, indent=1).encode()
    path = folder / MANIFEST
    path.write_bytes(data.replace(NO_DIGEST, hashlib.sha256(data).hexdigest().encode()))
    files.sync_file(path)
