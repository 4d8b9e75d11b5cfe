"""What commands share: streams that no character ends, exit status, the options of a model, the notice."""

import argparse
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import transformers

import zerolite
from zerolite.medqa.answers import NOTICE
from zerolite.medqa.generation import Settings
from zerolite.medqa.model import DTYPES
from zerolite.medqa.opening import Opened, open_model
from zerolite.medqa.processes import without_secrets

NOTICES = f"{NOTICE} 以下回答不构成医疗建议。"


class Parser(argparse.ArgumentParser):
    """Options of `zerolite NAME MODEL ...`; a mistake is a ValueError."""

    def __init__(self, name: str, description: str):
        super().__init__(prog=f"zerolite {name}", description=description, epilog=NOTICE, allow_abbrev=False)
        self.add_argument(
            "model", type=Path, help="Hugging Face folder, adapter folder, output folder of train_medqa.py, checkpoint"
        )
        self.add_argument("--base", type=Path, help="the adapter's base (default: what the adapter names)")
        self.add_argument("--tokenizer_name_or_path", type=Path, help="tokenizer folder (default: the model's)")
        self.add_argument("--template", help="own, zerolite, alpaca or a file of Jinja (default: the model's own)")
        self.add_argument("--precision", choices=[*DTYPES], help="default: bf16 on CUDA, fp32 on the CPU")
        self.add_argument("--system", type=clean, default="", help="system text")
        self.add_argument("--temperature", type=_temperature, default=0.0, help="0, the default, is greedy")
        self.add_argument("--max_new_tokens", type=count, help="default: 512, or half of what a smaller model reads")

    def error(self, message: str):
        raise ValueError(message)


def _temperature(text: str) -> float:
    value = float(text)
    if not (0 <= value and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text}")
    return value


def count(text: str) -> int:
    """A number of at least 1, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def clean(text: str) -> str:
    """A text of the command line, or of the terminal: bytes that its encoding does not have are read as UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\x00", "\ufffd")


def settings_of(given: argparse.Namespace) -> Settings:
    return Settings(given.temperature, given.max_new_tokens)


def opened(given: argparse.Namespace) -> Opened:
    """The model of the command line, with the notice and the template on stderr. Raises what `open_model` raises."""
    say(NOTICES)
    model = open_model(given.model, given.base, given.tokenizer_name_or_path, given.template, given.precision)
    settings_of(given).longest(model.room)
    say(f"{model.folder}: {model.told}")
    return model


def say(text: str) -> None:
    """To the user, beside the answers."""
    print(text, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Part of an answer."""
    print(text, end="", flush=True)


def run(name: str, command: Callable[[list[str]], None], argv: list[str] | None) -> int:
    """Carry out a command; its exit status: 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    transformers.logging.disable_progress_bar()
    try:
        command(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        say("\ninterrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        raise
    except (ValueError, OSError, zerolite.ZeroliteError) as error:
        say(f"zerolite {name}: error: {without_secrets(str(error))}")
        return 2
    return 0
