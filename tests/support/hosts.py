"""Hosts that reach each other over a wire and nothing else: network namespaces of this machine, joined by a veth pair.

A namespace belongs to a process that waits for the end of its stdin, so nothing is left of it when pytest ends. All
hosts have the disks, the memory and the cores of this machine.
"""

from __future__ import annotations

import ctypes
import subprocess

CLONE_NEWNET = 0x40000000
INTERFACE = "eth0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
START_S = 10


class Refused(RuntimeError):
    """The kernel, or the container that this runs in, gives no network namespaces."""


class Hosts:
    """Two of them, while it is entered: numbers of processes for `Program(network=)`, whose addresses are ADDRESSES."""

    def __enter__(self) -> list[int]:
        self.owners: list[subprocess.Popen] = []
        try:
            for _ in ADDRESSES:
                self.owners.append(_namespace())
            first, second = (str(owner.pid) for owner in self.owners)
            veth = ["ip", "link", "add", INTERFACE, "netns", first, "type", "veth", "peer", INTERFACE, "netns", second]
            _run(veth)
            for owner, address in zip(self.owners, ADDRESSES, strict=True):
                inside = ["nsenter", "-t", str(owner.pid), "-n", "ip"]
                _run([*inside, "address", "add", f"{address}/24", "dev", INTERFACE])
                _run([*inside, "link", "set", INTERFACE, "up"])
                _run([*inside, "link", "set", "lo", "up"])
        except Refused:
            self.__exit__()
            raise
        return [owner.pid for owner in self.owners]

    def __exit__(self, *exception) -> None:
        for owner in self.owners:
            owner.stdin.close()
            owner.wait()


def enter(owner: int) -> None:
    """Have this process, and those that it starts, be on the host of that process."""
    with open(f"/proc/{owner}/ns/net") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def _namespace() -> subprocess.Popen:
    command = ["unshare", "--net", "sh", "-c", "echo; exec cat > /dev/null"]
    try:
        owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        raise Refused(f"no network namespaces: {error}") from None
    if owner.stdout.read(1) != b"\n":  # it has not become one
        said = owner.stderr.read().decode().strip()
        owner.stdin.close()
        owner.wait()
        raise Refused(f"no network namespaces: {said}")
    return owner


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=START_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise Refused(f"{' '.join(command)}: {getattr(error, 'stderr', None) or error}") from None
