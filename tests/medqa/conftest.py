"""Of tests that open the web page in this process."""

from __future__ import annotations

import importlib.util
import sys

import pytest


@pytest.fixture(autouse=True, scope="session")
def absl_closes_no_stream() -> None:
    """absl's log handler closes the stderr that it found at import when uvicorn sets logging up: pytest's own."""
    if importlib.util.find_spec("absl") is not None:
        import absl.logging

        absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__  # which it never closes
