"""Programs as a user starts them, as forks of the zygote: `python script`, torchrun, and the ranks of a benchmark.

All of torchrun and of the benchmarks' harness is real but the last call: where they would start an interpreter, which
takes seconds to import torch and transformers, they fork one that has.
"""

from __future__ import annotations

import importlib
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import hosts
import torch.distributed.run
from limits import load, until
from paths import ROOT
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from zygote import zygote

BENCHMARKS = ROOT / "benchmarks"
END_S = 100.0  # of a program, on a quiet machine


class Program:
    """A program that runs, in a session of its own, with the methods of a text-mode `subprocess.Popen` with pipes."""

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str],
        ranks: int | Sequence[str] | None,
        environment: Mapping[str, str],
        log=None,
        network: int | None = None,
    ):
        """ranks: started by torchrun on so many, or with these options; None: by python.

        log: a file for what it prints; None: pipes. network: a process whose network it has; None: this one's.
        """
        ours, theirs = socket.socketpair()
        if log is None:
            (self.stdout, out), (self.stderr, err) = _pipe(), _pipe()
        else:
            out, err = os.dup(log.fileno()), os.dup(log.fileno())
        with ours, theirs:
            self._process = zygote().start(
                _become, theirs, str(script), list(arguments), ranks, dict(environment), network, out=out, err=err
            )
        os.close(out)
        os.close(err)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = END_S) -> tuple[str, str]:
        """The rest of stdout and stderr, once the program has ended. RuntimeError, and its end, where it does not."""
        texts = ["", ""]
        readers = [
            threading.Thread(target=lambda i=i, file=file: texts.__setitem__(i, file.read()))
            for i, file in enumerate((self.stdout, self.stderr))
        ]
        for reader in readers:
            reader.start()
        has_ended = until(lambda: self.poll() is not None, timeout)
        if not has_ended:
            os.killpg(self.pid, signal.SIGKILL)
        for reader in readers:
            reader.join(5 * load())  # whoever survives the program may hold the other end
        if not has_ended:
            raise RuntimeError(f"the program did not end in {timeout:.0f} s:\n{texts[0]}\n{texts[1]}")
        return texts[0], texts[1]


def _pipe():
    ours, theirs = os.pipe()
    return open(ours), theirs


def run(script: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a program prints on one process; AssertionError with its stderr where it fails."""
    program = Program(script, arguments, None, environment or {})
    out, err = program.communicate(280.0)
    assert program.returncode == 0, err
    return out


def _become(
    connection: int,
    script: str,
    arguments: list[str],
    ranks: int | Sequence[str] | None,
    environment: dict,
    network: int | None,
) -> None:
    os.close(connection)
    os.setsid()
    if network is not None:
        hosts.enter(network)
    os.environ.update(environment)
    _print_to_descriptors()
    SubprocessHandler._popen = _popen
    if ranks is None:
        _end_with(lambda: _run_script(script, arguments))
    options = ["--standalone", "--nproc-per-node", str(ranks)] if isinstance(ranks, int) else ranks
    _end_with(lambda: torch.distributed.run.main([*options, script, *arguments]))


def _print_to_descriptors() -> None:
    """Take stdout, stderr and the handlers of logs, which pytest had when they were made, to where they belong."""
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setStream(sys.stderr)


def _run_script(script: str, arguments: Sequence[str]) -> None:
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    if Path(script).is_relative_to(BENCHMARKS):
        sys.path.insert(0, str(BENCHMARKS))
        importlib.import_module("harness").start_rank = _start_rank
    runpy.run_path(script, run_name="__main__")


def _end_with(work: Callable[[], None]) -> None:
    """Run `work` and end this process as the interpreter would have. Does not return."""
    status = 0
    try:
        work()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Fork:
    """A fork of a program, with what torchrun and the harness ask of a `subprocess.Popen`."""

    def __init__(self, work: Callable[[], None], environment: Mapping[str, str], out=None, err=None):
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        for file, descriptor in (out, 1), (err, 2):
            if file is not None:
                os.dup2(file if isinstance(file, int) else file.fileno(), descriptor)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # as subprocess does: a rank would keep torchrun's store alive
        _end_with(work)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + timeout if timeout is not None else None
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked program", timeout)
            time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _popen(handler: SubprocessHandler, args: tuple, env: Mapping[str, str]) -> Fork:
    """torchrun's start of a rank: python -u script arguments."""
    _, _, script, *arguments = args
    return Fork(lambda: _run_script(script, arguments), env, handler._stdout, handler._stderr)


def _start_rank(script: str, function: str, folder: str, environment: Mapping[str, str], log) -> Fork:
    """The harness's start of a rank."""
    harness = importlib.import_module("harness")
    return Fork(lambda: harness.run_worker(Path(script), function, Path(folder)), environment, log, log)
