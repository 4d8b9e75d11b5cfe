"""The command `zerolite`: a table of modules, each imported when it is asked for."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from importlib import import_module

# Name: (module, one line). The module's `main(argv)` gives the exit status; it catches the mistakes of its users.
COMMANDS = {
    "doctor": ("zerolite.commands.doctor", "this machine: versions, links, limits, measured rates, what will be slow"),
    "plan": ("zerolite.commands.plan", "what training takes on each device and host, and what fits, before it runs"),
    "inspect": ("zerolite.commands.inspect", "what a checkpoint, a model or an adapter holds, and whether it is whole"),
    "consolidate": ("zerolite.commands.consolidate", "a checkpoint as a Hugging Face folder, without ranks or a GPU"),
    "migrate": ("zerolite.commands.migrate", "a configuration of DeepSpeed, Accelerate or FSDP as lines to write"),
    "prepare": ("zerolite.medqa.prepare", "files of any layout as one file of rows to train on, with a card"),
    "generate": ("zerolite.medqa.generate.command", "rows of training data from a model behind an endpoint"),
    "evaluate": ("zerolite.medqa.evaluate", "how good a model is, alone or against its base"),
    "ask": ("zerolite.medqa.ask", "one answer of a model, or answers to a file of questions"),
    "chat": ("zerolite.medqa.chat", "a dialogue with a model on the terminal"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` (None: the command line) begins with; its exit status, 2 where there is no such."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(COMMANDS)}"
        print(f"zerolite: error: there is no command {name!r}: {hint}", file=sys.stderr)
        return 2
    try:
        status = import_module(COMMANDS[name][0]).main(rest)
        sys.stdout.flush()  # here, where a reader that is gone is no traceback
        return status
    except ModuleNotFoundError as error:
        if (error.name or "zerolite").split(".")[0] == "zerolite":
            raise
        print(f"zerolite {name}: error: it needs {error.name}: pip install 'zerolite[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as of `zerolite ask ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(["usage: zerolite COMMAND ...", "", *lines, "", "zerolite COMMAND --help lists its options."])
