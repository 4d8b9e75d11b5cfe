"""Regular expressions that a file brought: matched within bounded time, since some take for ever on a short name.

`regex` reads Python's patterns and, unlike `re`, can be told to give up.
"""

import regex

SECONDS = 0.5  # of the processor for one name; a pattern that is meant for names of modules takes microseconds


def is_regular(pattern: str) -> bool:
    """Whether the text is a regular expression."""
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError):
        return False
    return True


def fullmatch(pattern: str, text: str):
    """As re.fullmatch. ValueError, with the pattern, where it takes too long."""
    return _bounded(regex.fullmatch, pattern, text)


def match(pattern: str, text: str):
    """As re.match. ValueError, with the pattern, where it takes too long."""
    return _bounded(regex.match, pattern, text)


def _bounded(how, pattern: str, text: str):
    try:
        return how(pattern, text, timeout=SECONDS)
    except TimeoutError:
        raise ValueError(
            f"the pattern {pattern[:80]!r} takes more than {SECONDS} s on the name {text[:80]!r}: write it without "
            "repetitions inside repetitions"
        ) from None
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:80]!r} is no regular expression: {error}") from None
