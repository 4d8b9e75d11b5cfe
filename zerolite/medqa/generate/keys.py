"""The key of the endpoint, which stands in the environment and nowhere else."""

import os

SHORTEST = 8  # characters of a key that tell something


class Key:
    """The key, whose repr hides it, and texts without it."""

    def __init__(self, value: str):
        self.value = value

    def __repr__(self) -> str:
        return "Key(***)"

    def masked(self, text: str) -> str:
        """A text in which every run of 8 or more characters of the key is asterisks; a shorter key, as a whole."""
        length = min(SHORTEST, len(self.value))
        runs = {self.value[start : start + length] for start in range(len(self.value) - length + 1)} if length else ()
        hidden: set[int] = set()
        for run in runs:
            place = text.find(run)
            while place >= 0:
                hidden.update(range(place, place + length))
                place = text.find(run, place + 1)
        return "".join("*" if place in hidden else c for place, c in enumerate(text)) if hidden else text

    def is_in(self, text: str) -> bool:
        """Whether an answer holds the key; a key of fewer than 8 characters ("EMPTY", "none") is no secret."""
        return len(self.value) >= SHORTEST and self.masked(text) != text


def from_environment() -> Key:
    """The key of OPENAI_API_KEY. Raises ValueError where there is none, or it is none that a header can carry."""
    value = os.environ.get("OPENAI_API_KEY", "").strip()
    if not value:
        raise ValueError("OPENAI_API_KEY is not set: export it (any word, for a server that asks for none)")
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("OPENAI_API_KEY: expected printable ASCII without spaces")
    return Key(value)
