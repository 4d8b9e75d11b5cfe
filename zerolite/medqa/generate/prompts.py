"""Prompts as files: `NAME.LANGUAGE.md`, with a part `# system` and a part `# user`, and `$words` that are filled in."""

import hashlib
import re
import string
from dataclasses import dataclass
from pathlib import Path

SHIPPED = Path(__file__).parent / "prompts"
# What a prompt must ask for, and what it may name besides.
NEEDED = {
    "self_instruct": {"examples", "count"},
    "dialogue": {"examples", "count"},
    "passage": {"passage", "count"},
    "check": {"passage", "examples"},
}
KNOWN = {"examples", "count", "passage", "persona"}


@dataclass(frozen=True)
class Prompt:
    """One prompt file."""

    name: str  # of the file
    digest: str  # SHA-256 of its bytes, 16 digits
    system: str
    user: str

    def messages(self, **words: str) -> tuple[dict[str, str], ...]:
        system = [{"role": "system", "content": string.Template(self.system).substitute(words)}] if self.system else []
        return (*system, {"role": "user", "content": string.Template(self.user).substitute(words)})


def load(kind: str, language: str, folder: Path | None) -> Prompt:
    """The prompt of `folder`, or the shipped one where that has none. Raises ValueError for what is no prompt."""
    file = _file(f"{kind}.{language}.md", folder)
    content = _read(file)
    parts = re.split(r"^# (system|user)[ \t]*$", content, flags=re.MULTILINE)
    found = {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    if parts[0].strip() or not found.get("user") or len(parts) // 2 != len(found):
        raise ValueError(f"{file}: expected `# system` and `# user`, each once, with a text below")
    matches = list(string.Template.pattern.finditer(found.get("system", "") + found["user"]))
    if any(match["invalid"] is not None for match in matches):
        raise ValueError(f"{file}: has a `$` that begins no word: `$$` is a dollar sign")
    words = {match["named"] or match["braced"] for match in matches} - {None}
    if unknown := sorted(words - KNOWN):
        raise ValueError(f"{file}: has ${', $'.join(unknown)}: known are ${', $'.join(sorted(KNOWN))}")
    if missing := sorted(NEEDED[kind] - words):
        raise ValueError(f"{file}: lacks ${', $'.join(missing)}")
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Prompt(file.name, digest, found.get("system", ""), found["user"])


def personas(language: str, folder: Path | None) -> list[str]:
    """Who asks: the lines of `personas.LANGUAGE.txt`."""
    file = _file(f"personas.{language}.txt", folder)
    lines = [line.strip() for line in _read(file).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file}: expected a person a line")
    return lines


def _file(name: str, folder: Path | None) -> Path:
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--prompts {folder}: there is no such folder")
    return folder / name if folder is not None and (folder / name).exists() else SHIPPED / name


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None
