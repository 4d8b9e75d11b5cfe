"""What is said never ends a program: characters that a terminal has not, a reader or a terminal that is gone."""

import contextlib
import os
import sys
from collections.abc import Iterator


class Lasting:
    """A text stream of which writing fails no more: what cannot be written is lost, and so is all that follows."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # of a stream that `reconfigure` does not reach
            encoding = self._stream.encoding or "ascii"
            return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            self._lose()
            return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        """Have the descriptor lead nowhere, so that what the stream still holds can be flushed at the end."""
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Inside, no print ends the program: other characters are escaped, a lost stdout or stderr is silence.

    A run goes on when its ssh connection, its `tee` or the disk of its log is gone; what it writes elsewhere counts.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (Lasting(stream) for stream in before)
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before
