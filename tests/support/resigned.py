"""A checkpoint edited by somebody who makes its sizes and hashes right again: by hand, or with another tool."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

Header = dict


def resign(folder: Path, manifest: dict) -> None:
    """Write manifest.json with the sizes and hashes that the files have, and its own."""
    for name, entry in manifest["files"].items() if isinstance(manifest.get("files"), dict) else ():
        path = folder / name[:200]
        if path.is_file() and isinstance(entry, dict):
            data = path.read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.pop("sha256", None)
    text = json.dumps(manifest | {"sha256": "0" * 64}).encode()
    head, _, tail = text.rpartition(b"0" * 64)
    (folder / "manifest.json").write_bytes(head + hashlib.sha256(text).hexdigest().encode() + tail)


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    resign(folder, manifest)


def split(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def join(path: Path, header: Header, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def edit_file(folder: Path, name: str, change: Callable[[Header], None]) -> None:
    """Change the header of one file; its numbers stay."""
    header, body = split(folder / name)
    change(header)
    join(folder / name, header, body)
    edit_manifest(folder, lambda manifest: None)


def edit_metadata(folder: Path, name: str, key: str, change: Callable) -> None:
    """`change` takes the JSON value of a metadata entry and returns another, or a text as it shall stand."""

    def edit(header: Header) -> None:
        value = change(json.loads(header["__metadata__"][key]))
        header["__metadata__"][key] = value if isinstance(value, str) else json.dumps(value)

    edit_file(folder, name, edit)


def unchanged(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)
