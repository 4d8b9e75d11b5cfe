"""What the commands share: a parser whose mistakes are one line, exit statuses, tables, texts of strangers."""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from zerolite.errors import CheckpointError, ZeroliteError

OK, BAD, MISTAKE = 0, 1, 2  # what was looked at is right; is not; the command cannot be carried out
MAX_SHOWN, MAX_ERROR = 100, 600  # characters


class Parser(argparse.ArgumentParser):
    """Options of `zerolite NAME`; a mistake is a ValueError. `told`: examples and exit statuses, as they are."""

    def __init__(self, name: str, description: str, told: str):
        super().__init__(
            prog=f"zerolite {name}",
            description=description,
            epilog=told,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise ValueError(f"{message}; zerolite {self.prog.split()[-1]} --help lists the options")


def run(name: str, command: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Carry out a command; its exit status: what it returns, 1 for a broken checkpoint, 2 for a mistake of the user."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print(f"zerolite {name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except RecursionError:  # values inside of values, by the hundred: no program of ours writes them
        print(f"zerolite {name}: error: what the file holds nests too deeply", file=sys.stderr)
        return BAD
    except BrokenPipeError:  # as of `| head`: see zerolite.cli
        raise
    except (ValueError, OSError, ZeroliteError) as error:
        print(f"zerolite {name}: error: {shown(' '.join(str(error).split()), MAX_ERROR)}", file=sys.stderr)
        return BAD if isinstance(error, CheckpointError) else MISTAKE


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def shown(value: Any, longest: int = MAX_SHOWN) -> str:
    """A stranger's text on one line of a terminal: no control characters, cut."""
    text = "".join(char if char.isprintable() else "\ufffd" for char in str(value)[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns, two spaces apart; those of `right` end at one place."""
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if c in right else cell.ljust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def bytes_told(num_bytes: float) -> str:
    """As "1.5 GiB"; whole bytes below a KiB."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:,.0f} bytes"


def count_told(number: float) -> str:
    """As "1.2 B" for counts of parameters: K, M, B are powers of 1,000."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,.0f}"
