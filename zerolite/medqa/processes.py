"""The processes of a run: how they join, add up numbers, notice that they are to stop, and end without a hang."""

import contextlib
import ctypes
import os
import re
import resource
import shlex
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

import zerolite

# What a collective raises when another rank is gone, or had the process group aborted because it ends. That rank prints
# the cause, so this one keeps it short.
PEER_FAILURES = (
    "did not complete",  # zerolite's own, with the other rank's reason
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Application timeout caused pair closure",
    "Connection reset by peer",
    "Broken pipe",
    "process group has not been initialized",
)
# How long a rank that has nothing new to say waits, for the one that has. That one speaks before its process ends, and
# the others hear of it when its connections close or in the moment before, so this only covers its print.
PATIENCE_S = 1.0
# How long a rank waits for rank 0 to say what both found: torchrun ends it then. Before ranks have joined each other,
# rank 0 comes to it whenever its imports are done.
SAME_S = 2.0
SAME_BEFORE_JOIN_S = 10.0
TEXT_BYTES = 512
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; on one process without torchrun, rank 0 of 1."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over the ranks. Every rank must call it with as many values."""
        return [sum(column) for column in zip(*self.gather(*values), strict=True)]

    def gather(self, *values: float) -> list[list[float]]:
        """The values of each rank, in rank order. Every rank must call it with as many values."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size == 1:
            return [mine.tolist()]
        rows = mine.new_empty(self.world_size, len(values))
        dist.all_gather(list(rows), mine)
        return rows.tolist()  # one wait for the device

    def gather_texts(self, text: str) -> list[str]:
        """Of each rank a text, of which TEXT_BYTES travel, in rank order. Every rank must call it."""
        rows = self.gather(*text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0"))
        return [bytes(map(int, row)).rstrip(b"\0").decode(errors="replace") for row in rows]

    def print(self, text: str | None) -> None:
        """Print on rank 0 only; None: nothing."""
        if self.rank == 0 and text is not None:
            print(text, flush=True)

    def peak_memory_bytes(self) -> int:
        """Most device memory that tensors of this process took; on the CPU its largest resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment_rank() -> int:
    """This process's rank as torchrun gave it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def join(mistake: str = "") -> Processes:
    """Take this process's device and, under torchrun, join the others, or a process group that is there already.

    Every rank must call it, one that cannot go on with its `mistake`: ValueError on every rank then, which names it.
    """
    probe = nn.Module()  # goes where a model would go, and has the process group started as a model has
    probe.register_buffer("place", torch.zeros(()))
    device = zerolite.shard(probe, stage=0).place.device
    if not dist.is_initialized():
        return Processes(0, 1, device)
    ranks = Processes(dist.get_rank(), dist.get_world_size(), device)
    found = [f"rank {rank}: {text}" for rank, text in enumerate(ranks.gather_texts(mistake)) if text]
    if found:
        raise ValueError("; ".join(found[:4]))
    return ranks


class StopSignals:
    """Inside `with`, Ctrl-C, SIGTERM and SIGHUP only leave a note, for the loop to find where all ranks stop together.

    SIGHUP, of a lost connection, is left ignored where it is: `nohup` says so.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self) -> "StopSignals":
        self.received = dict.fromkeys(self.SIGNALS, 0)
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        noted = [number for number in self.SIGNALS if not (is_nohup and number == signal.SIGHUP)]
        self.previous = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.received[number] = 1

    def counts(self) -> list[int]:
        """What this rank received, one number a signal: to be summed over the ranks and given to `agreed`."""
        return list(self.received.values())

    @classmethod
    def agreed(cls, counts: list[float]) -> signal.Signals | None:
        """The signal that some rank received, the same answer on every rank."""
        return next((number for number, count in zip(cls.SIGNALS, counts, strict=True) if count), None)


def end_with_torchrun() -> None:
    """Have this rank receive SIGTERM when its torchrun is gone, which then cannot send one: it would train for ever.

    A rank that trains notes the signal, saves at the next step boundary and ends; one that does not yet train ends at
    once. Optimizer workers end with their rank. Nothing is changed without torchrun, where a shell may well end first.
    """
    agent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != agent or not _is_agent_listening():  # it ended in between, or while this rank imported torch
            os.kill(os.getpid(), signal.SIGTERM)


def _is_agent_listening() -> bool:
    """False where nobody listens at the store that torchrun opens before it starts a rank, which ends with it.

    A rank that missed the end has another process as its parent, and would try to reach the store for minutes.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5).close()
    except ConnectionRefusedError:
        return False
    except OSError:  # the network's, of which torch will tell
        return True
    return True


def refuse(error: Exception, rank: int, status: int = 2, program: str = "train_medqa.py") -> int:
    """Say what the user is to change, in one message; the exit status.

    Every rank finds most mistakes, and rank 0 tells them. It tells what others alone have found, too: it waits for them
    in `join`, so they come there with it.
    """
    if type(error) in (zerolite.ZeroliteError, zerolite.WorkerError) and _is_of_another_rank(error, rank):
        return report_failure(error, rank)
    if rank != 0 and dist.is_initialized():
        time.sleep(SAME_S)
    elif rank != 0:
        mistake = without_secrets(str(error))
        joining = threading.Thread(target=_join_with, args=(mistake,), daemon=True)  # rank 0 may never come
        joining.start()
        joining.join(SAME_BEFORE_JOIN_S)
        if not joining.is_alive():
            return status
    print(f"{program}: error: {without_secrets(str(error))}", file=sys.stderr)
    return status


def without_secrets(text: str) -> str:
    """URLs, given where a path is expected, less user, password and keys; a `Path` has one slash fewer."""
    text = re.sub(r"(\w:/{1,2})[^/\s@]+@", r"\1***@", text)
    return re.sub(r"(?i)((?:token|key|secret|password|signature)=)[^&\s'\"]+", r"\1***", text)


def _join_with(mistake: str) -> None:
    with contextlib.suppress(ValueError):  # this one
        join(mistake)


def report_failure(error: Exception, rank: int) -> int:
    """Print why this rank ends, so that the rank with the cause speaks first; the exit status."""
    if _is_of_another_rank(error, rank):
        time.sleep(PATIENCE_S)
        _tell(RuntimeError(f"rank {rank}: ends because another rank did ({str(error).splitlines()[0]})"))
    elif isinstance(error, zerolite.WorkerError):
        print(error, file=sys.stderr)
    else:
        print(f"rank {rank} failed: {error}", file=sys.stderr)
        if isinstance(error, zerolite.CheckpointError):  # a full disk: where it was noticed does not matter
            error = type(error)(str(error))
        _tell(error)
    return 1


def _tell(error: Exception) -> None:
    """As the interpreter does: zerolite's hook tells the other ranks, too, and what they have told."""
    sys.excepthook(type(error), error, error.__traceback__)


def _is_of_another_rank(error: Exception, rank: int) -> bool:
    """Whether the cause is with another rank, which says it."""
    text = str(error)
    if isinstance(error, zerolite.WorkerError):  # heard on every rank, it names the one whose worker it is
        return text.startswith("rank ") and not text.startswith(f"rank {rank}:")
    return any(mark in text for mark in PEER_FAILURES)


def leave(status: int) -> None:
    """End this process. Does not return.

    Under torchrun not by `exit`: gloo's threads abort there now and then, and a rank that failed must not wait for
    others that wait for it.
    """
    if dist.is_initialized() and status == 0:
        try:
            dist.barrier()
        except RuntimeError as error:  # the result is complete, whatever became of the others
            print(f"done; another rank ended before this one could ({str(error).splitlines()[0]})", file=sys.stderr)
    if "WORLD_SIZE" in os.environ or dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def command(*arguments: str, num_ranks: int | None = None) -> str:
    """`launched` of this program with other arguments."""
    return launched(sys.argv[0], *arguments, num_ranks=num_ranks)


def launched(*program: str, num_ranks: int | None = None) -> str:
    """A shell command that runs a program on as many ranks as this one, or on `num_ranks`, on the same machines.

    Of several machines it is the first one's; what the others change stands behind it, as a shell's comment.
    """
    world_size, local_size = (int(os.environ.get(name, "0")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    num_machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    is_same = num_ranks in (None, world_size)
    num_ranks = num_ranks or world_size
    if num_machines > 1 and (is_same or num_ranks % num_machines == 0):
        local = local_size if is_same else num_ranks // num_machines
        where = ["--master-addr", os.environ["MASTER_ADDR"], "--master-port", os.environ["MASTER_PORT"]]
        launcher = ["torchrun", "--nnodes", str(num_machines), "--nproc-per-node", str(local), "--node-rank", "0"]
        note = "machine: --node-rank 1" if num_machines == 2 else f"machines: --node-rank 1 to {num_machines - 1}"
        if local * num_machines != num_ranks:
            note += ", and --nproc-per-node as it was there"
        return f"{shlex.join([*launcher, *where, *program])}  # on the other {note}"
    if is_same and world_size > max(local_size, 1):  # without torchrun: by hand, or srun, on machines nobody told of
        return f"{shlex.join(['python', *program])}  # on {world_size} ranks, launched as these were"
    if num_ranks > 1 or local_size:
        return shlex.join(["torchrun", "--standalone", "--nproc-per-node", str(num_ranks), *program])
    return shlex.join(["python", *program])
