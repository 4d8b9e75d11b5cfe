"""One process that has imported everything and run nothing; test processes are forks of it, ready at once.

It is itself a fork of pytest, after the test files are collected and before the first of them runs: it has what they
import, and neither gloo's nor autograd's threads, so it can be forked safely. It reaps its children for pytest, and
everything dies with its parent.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child that dies with this process; exit code 0, or 3 where it raised."""
    me = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        die_with(me)
        work()
        os._exit(0)
    except BaseException:
        os._exit(3)
    finally:
        os._exit(4)


class Process:
    """A child of the zygote, with the methods of a `subprocess.Popen`."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.zygote, self.pid, self.returncode = zygote, pid, None

    def poll(self) -> int | None:
        return self._ask(os.WNOHANG)

    def wait(self) -> int:
        return self._ask(0)

    def kill(self) -> None:
        if self.poll() is None:  # not reaped, so the number is still its own
            os.kill(self.pid, signal.SIGKILL)

    def _ask(self, options: int) -> int | None:
        if self.returncode is None:
            self.returncode = self.zygote.reap(self.pid, options)
        return self.returncode


class Zygote:
    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = fork(lambda: breed(self.socket, theirs))
        theirs.close()

    def start(self, work: Callable, connection: socket.socket, *arguments, out: int = 1, err: int = 2) -> Process:
        """A process that runs `work(descriptor of the connection, *arguments)`; pytest captures what it prints."""
        socket.send_fds(self.socket, [pickle.dumps((work, arguments))], [connection.fileno(), out, err])
        return Process(self, pickle.loads(self.socket.recv(1 << 10)))

    def reap(self, pid: int, options: int) -> int | None:
        self.socket.send(pickle.dumps((pid, options)))
        return pickle.loads(self.socket.recv(1 << 10))

    def close(self) -> None:
        self.socket.close()
        os.waitpid(self.pid, 0)


def breed(others: socket.socket, requests: socket.socket) -> None:
    """The life of the zygote: fork and reap until pytest closes the other end."""
    others.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for pytest, which ends the rest
    gc.collect()
    gc.freeze()  # forks share what is imported, and their collections need not look at it
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 16, 3)
        if not message:
            return
        first, second = pickle.loads(message)
        if descriptors:
            reply = fork(lambda: begin(descriptors, first, second))  # noqa: B023
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            pid, status = os.waitpid(first, second)
            reply = os.waitstatus_to_exitcode(status) if pid else None
        requests.send(pickle.dumps(reply))


def begin(descriptors: list[int], work: Callable, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    connection, out, err = descriptors
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    sys.stdout.reconfigure(line_buffering=True)
    work(connection, *arguments)


@functools.cache
def zygote() -> Zygote:
    """The one of this pytest process; conftest.py asks for it first."""
    return Zygote()
