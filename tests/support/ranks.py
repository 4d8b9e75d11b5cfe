"""A pool of persistent rank processes, forks of the zygote: nothing is imported once a process or once a test.

`pool(world).run(fn, *args)` runs a module-level function on ranks 0..world-1 in lockstep, in a fresh gloo process
group, and returns the list of results. An exception on a rank is raised in the test with rank and traceback; a hang is
a `RankTimeout`. When a rank does not answer, the processes are killed and the next run starts new ones. Nothing
survives pytest: ranks die with their parent, and never by `exit` (gloo's threads abort there now and then).
"""

from __future__ import annotations

import gc
import os
import pickle
import socket
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

from limits import Limit, until
from zygote import zygote

TIMEOUT_S = 60.0  # one run, from the send to the last result; as all of these, of a quiet machine
START_S = 20.0  # for a process to be forked
GRACE_S = 5.0  # for the other ranks, once one has failed
LOOK_S = 0.5  # between two looks at the load


class RankError(RuntimeError):
    """A rank raised: its number, the exception's class name and text, and the traceback."""

    def __init__(self, rank: int, kind: str, message: str, trace: str) -> None:
        super().__init__(rank, kind, message, trace)
        self.rank, self.kind, self.message, self.trace = rank, kind, message, trace

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.kind}: {self.message}\n{self.trace}"


class RankTimeout(RuntimeError):
    """Not every rank answered in time."""


class Rank:
    """One process and the pipe to it."""

    def __init__(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = zygote().start(serve, theirs, number)
        self.pipe = Connection(ours.detach())
        self.ready = False

    def receive(self):
        return pickle.loads(self.pipe.recv_bytes())

    def end(self) -> None:
        """It leaves by itself when the pipe is closed, unless it hangs."""
        self.pipe.close()
        until(lambda: self.process.poll() is not None, GRACE_S)
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class Pool:
    def __init__(self) -> None:
        self.ranks: list[Rank] = []
        self.folder = tempfile.TemporaryDirectory(prefix="zerolite-ranks-")
        self.runs = 0

    def __call__(self, world: int, *, distributed: bool = True, timeout: float = TIMEOUT_S) -> Team:
        """The first `world` ranks; `distributed=False` leaves torch.distributed uninitialised."""
        return Team(self, world, distributed, timeout)

    def start(self, world: int) -> list[Rank]:
        if any(rank.process.poll() is not None for rank in self.ranks):  # killed from outside since the last run
            self.kill()
        while len(self.ranks) < world:
            self.ranks.append(Rank(len(self.ranks)))
        for number, rank in enumerate(self.ranks[:world]):
            if not rank.ready:
                try:
                    if not until(lambda rank=rank: rank.pipe.poll(0.01), START_S):
                        raise RankTimeout(f"rank {number} did not start in {START_S:.0f} s")
                    rank.ready = rank.receive()
                except (EOFError, ConnectionError, RankTimeout):
                    self.kill()  # the next run starts anew
                    raise
        return self.ranks[:world]

    def rendezvous(self) -> str:
        self.runs += 1
        return str(Path(self.folder.name) / str(self.runs))

    def close(self) -> None:
        for rank in self.ranks:
            rank.end()
        self.ranks = []

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
        self.ranks = []


class Team:
    def __init__(self, pool: Pool, world: int, distributed: bool, timeout: float) -> None:
        self.pool, self.world, self.distributed, self.timeout = pool, world, distributed, timeout

    def run(self, function, *args) -> list:
        """`function(*args)` on every rank; the results in rank order."""
        ranks = self.pool.start(self.world)
        task = pickle.dumps((function, args, self.world, self.pool.rendezvous() if self.distributed else None))
        for rank in ranks:
            rank.pipe.send_bytes(task)
        answers, broken = self._gather(ranks)  # in the order of arrival: the first failure is the cause
        if broken or len(answers) < self.world:
            self.pool.kill()
        for answer in answers.values():
            if isinstance(answer, RankError):
                raise answer
        if len(answers) < self.world:
            missing = sorted(set(range(self.world)) - set(answers))
            raise RankTimeout(
                f"no answer from ranks {missing} of {self.world} in {self.timeout:.0f} s: {function.__name__}"
            )
        return [answers[number] for number in range(self.world)]

    def _gather(self, ranks: list[Rank]) -> tuple[dict, bool]:
        answers, broken, limit = {}, False, Limit(self.timeout)
        waiting = {rank.pipe: number for number, rank in enumerate(ranks)}
        while waiting and not limit.is_over():
            for pipe in wait(list(waiting), timeout=min(limit.left, LOOK_S)):
                number = waiting.pop(pipe)
                try:
                    answers[number] = ranks[number].receive()
                except (EOFError, ConnectionError):
                    answers[number] = RankError(number, "ProcessDied", f"exit {ranks[number].process.wait()}", "")
                    broken = True
                if isinstance(answers[number], RankError):
                    limit.left = min(limit.left, GRACE_S)
        return answers, broken


def serve(descriptor: int, number: int) -> None:
    """The life of a rank process: answer until the pipe closes."""
    pipe = Connection(descriptor)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    pipe.send_bytes(pickle.dumps(True))
    while True:
        try:
            task = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            os._exit(0)
        leave()  # not before: another rank may still have been in the last run's collectives
        reply, has_failed = answer(task, number)
        pipe.send_bytes(reply)
        if has_failed:
            leave()  # at once, so that those who wait for this rank fail too, but later than it


def answer(task: bytes, number: int) -> tuple[bytes, bool]:
    try:
        function, args, world, rendezvous = pickle.loads(task)
        join(rendezvous, number, world)
        return pickle.dumps(function(*args)), False
    except BaseException as error:  # whatever it is, the test must hear of it
        return pickle.dumps(RankError(number, type(error).__name__, str(error), traceback.format_exc())), True


def join(rendezvous: str | None, number: int, world: int) -> None:
    import torch.distributed as dist

    if rendezvous is not None:
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        dist.init_process_group("gloo", store=dist.FileStore(rendezvous, world), rank=number, world_size=world)
        dist.barrier()  # nobody leaves before everybody has joined


def leave() -> None:
    import torch.distributed as dist

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    gc.collect()
    gc.freeze()  # what is left are modules: the next collection need not look at them
    if dist.is_initialized():
        dist.destroy_process_group()
        forget_meshes()


def forget_meshes() -> None:
    """DTensor keeps what it has inferred by mesh: an equal mesh of the next world would get the groups of this one."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
