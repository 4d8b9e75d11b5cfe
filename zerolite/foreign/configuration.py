"""A nested configuration of another program; every key is told: used, not needed, no counterpart, unknown."""

import difflib
import importlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zerolite.foreign.keys import DEFAULTS, KNOWN, NO_COUNTERPART, NOT_NEEDED, USED_KEYS

USED, IDLE, NONE, UNKNOWN = "used", "not needed", "no counterpart", "unknown"
AUTO = "auto"
OFF: tuple[Any, ...] = (False, None, 0, "", "no", "none", AUTO, [], {})
MAX_BYTES, MAX_KEYS = 1 << 20, 5000


class Key(NamedTuple):
    name: str  # "section.key"
    value: Any
    status: str
    told: str


class Configuration:
    """Keys of a file, by their names with dots. What is neither used nor in the tables is unknown."""

    def __init__(self, values: Mapping[str, Any]):
        self.leaves = dict(_leaves(values, ""))
        self._told: dict[str, tuple[str, str]] = {}

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key; a text that is a number (YAML's 5e8) is one."""
        return _number(self.leaves.get(name, default))

    def number(self, name: str, default: float = 0.0) -> float:
        """A number; ValueError, with the key, for anything else."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name}: expected a number, got {value!r}")
        return float(value)

    def count(self, name: str, default: Any = None) -> Any:
        """A whole number of at least 0, AUTO, or None where it is absent; ValueError, with the key, for else."""
        value = self.get(name, default)
        if value is None or value == AUTO:
            return value
        number = self.number(name, default)
        if number != int(number) or number < 0:
            raise ValueError(f"{name}: expected a whole number of at least 0, got {value!r}")
        return int(number)

    def section(self, name: str) -> dict[str, Any]:
        return {key.removeprefix(f"{name}."): self.get(key) for key in self.leaves if key.startswith(f"{name}.")}

    def is_on(self, name: str) -> bool:
        """Whether a switch says yes, as Python, JSON, YAML or the environment write it."""
        return str(self.get(name)).lower() in ("true", "yes", "1")

    def tell(self, name: str, status: str, told: str) -> None:
        """Say what became of a key, where it is there."""
        if name in self.leaves:
            self._told[name] = (status, told)

    def use(self, name: str, told: str) -> None:
        self.tell(name, USED, told)

    def keys(self) -> list[Key]:
        """Every key of the file, in its order, with what became of it."""
        return [Key(name, value, *(self._told.get(name) or self._look_up(name))) for name, value in self.leaves.items()]

    def why_idle(self, name: str) -> str | None:
        """Why a key asks for nothing: its section is off, or its value is none or the default; None where it asks."""
        value, switch = self.get(name), self.leaves.get(f"{name.split('.')[0]}.enabled", True)
        is_off = str(switch).lower() in ("false", "no", "0", "none")
        if is_off or any(value is off or (value == off and type(value) is type(off)) for off in OFF):
            return "it is off"
        return "it says what is so anyway" if name in DEFAULTS and value == DEFAULTS[name] else None

    def _look_up(self, name: str) -> tuple[str, str]:
        for pattern in _patterns(name):
            if pattern in NOT_NEEDED:
                return IDLE, NOT_NEEDED[pattern]
            if pattern in NO_COUNTERPART or pattern in USED_KEYS:
                why = self.why_idle(name)
                return (IDLE, why) if why else (NONE, NO_COUNTERPART.get(pattern, "nothing reads it here"))
        if self.leaves[name] == {}:
            return IDLE, "it is empty"
        near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.8)
        return UNKNOWN, f"is {near[0]} meant?" if near else "no key of DeepSpeed, Accelerate or FSDP that is known here"


def read(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file. ValueError, with the file, for anything else, and a key that stands twice."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a JSON or YAML file")
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: has over {MAX_BYTES:,} bytes, which no configuration has")
    try:
        text = data.decode("utf-8-sig")
        try:
            found = json.loads(text, object_pairs_hook=_once)
        except json.JSONDecodeError:
            if path.suffix == ".json" and not _is_lenient(text):
                raise
            found = _read_yaml(text)
    except (ValueError, RecursionError) as error:
        what = "nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: cannot be read as JSON or YAML: {what}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: expected a configuration with keys, got {'nothing' if not found else 'no mapping'}")
    return found


def _is_lenient(text: str) -> bool:
    """Whether it may be what DeepSpeed's reader (hjson) takes and YAML's does: trailing commas, comments."""
    return text.lstrip().startswith("{")


def _read_yaml(text: str) -> Any:
    yaml = importlib.import_module("yaml")  # transformers brings it

    try:
        _check_names(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _check_names(root: Any) -> None:
    """ValueError for a mapping of YAML's nodes that has a key twice, which its reader takes the last of."""
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue
        seen.add(id(node))
        pairs = [child for child in node.value if isinstance(child, tuple)]
        _once([(str(key.value), None) for key, _ in pairs])
        stack += [value for _, value in pairs] if pairs else node.value


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the key {name!r} stands twice")
    return dict(pairs)


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    num_left = MAX_KEYS
    stack = [(prefix, values)]
    while stack:
        above, inner = stack.pop()
        found = []
        for key, value in inner.items():
            num_left -= 1
            if num_left < 0:
                raise ValueError(f"it has over {MAX_KEYS:,} keys, which no configuration has")
            name = f"{above}{key}"
            if isinstance(value, Mapping) and value:
                found.append((f"{name}.", value))
            else:
                yield name, value
        stack += reversed(found)


def _patterns(name: str) -> Iterator[str]:
    yield name
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length]) + ".*"


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
