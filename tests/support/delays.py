"""Things that happen late: what a GPU's streams and a busy machine do to the order of events, on the CPU and by lot.

`slow_workers` has the optimizer processes sleep before each command. `late_device` gives the engine a device whose
copies and collectives run beside the host, each when it likes, as far as streams and events let it:

    compute     the calling thread, where torch runs at once; and a queue behind it, for uses of memory that end later
    a stream    a thread; copies wait for their turn, sleep, and are torn in two
    a group     a thread a group, as NCCL has a stream; a collective waits for the stream it was called on

The host never waits but where the engine says so, with three exceptions, since torch runs here at once: a wait on the
compute stream, the wait for a collective, and an all-reduce. The first would hide that the host must wait for gradients
by itself; so with `reads_at_once` copies read their source when they are called, and buffers that go back to the pool
behind a copy need no wait.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def slow_workers(seconds: float, seed: int = 0, is_fixed: bool = False) -> Iterator[None]:
    """Workers started inside sleep up to `seconds` before each command, or just that long."""
    from zerolite_kernels import cpu_worker

    script = cpu_worker.__file__
    kernels = str(Path(script).resolve().parents[1])
    settings = {"kernels": kernels, "seconds": seconds, "seed": seed, "is_fixed": is_fixed}
    os.environ["DELAYS"] = json.dumps(settings)
    cpu_worker.__file__ = str(Path(__file__).with_name("slow_worker.py"))
    try:
        yield
    finally:
        cpu_worker.__file__ = script
        del os.environ["DELAYS"]


class Stream:
    """Work in the order of its arrival, on a thread of its own."""

    def __init__(self, lots: random.Random, seconds: float):
        self.lots, self.seconds = lots, seconds * lots.choice([0.1, 1.0, 4.0])  # some are slow, whoever waits for them
        self.thread = ThreadPoolExecutor(1)

    def nap(self) -> None:
        if self.lots.random() < 0.7:
            time.sleep(self.seconds * self.lots.random())

    def put(self, work: Callable[[], None] = lambda: None) -> Future:
        return self.thread.submit(work)


def late_device_class():
    from zerolite.runtime.device import Cpu

    class LateDevice(Cpu):
        """As device.py describes the methods."""

        def __init__(self, lots: random.Random, seconds: float, reads_at_once: bool):
            super().__init__()
            self.lots, self.seconds = lots, seconds
            self.streams: list[Stream] = []
            self.compute = self.current = self.new_stream()
            self.groups: dict[int, Stream] = {}
            self.reads_at_once = reads_at_once
            self.is_releasing = False
            self.failures: list[str] = []

        def new_stream(self) -> Stream:
            self.streams.append(Stream(self.lots, self.seconds))
            return self.streams[-1]

        @contextmanager
        def on(self, stream: Stream, after_current: bool = False):
            if after_current:
                stream.put(self.record().result)
            before, self.current = self.current, stream
            try:
                yield
            finally:
                self.current = before

        def record(self) -> Future:
            return self.current.put()

        def wait(self, event: Future) -> None:
            self.current.put(event.result)
            if self.current is self.compute and not (self.is_releasing and self.reads_at_once):
                event.result()

        def synchronize(self, event: Future) -> None:
            event.result()

        def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
            middle = target.numel() // 2
            stream, source = self.current, source.clone() if self.reads_at_once else source

            def run() -> None:
                for part in (slice(middle), slice(middle, None)):
                    stream.nap()
                    target[part].copy_(source[part])

            self.current.put(lambda: self.noting_failure(run))
            if self.current is self.compute:
                self.record().result()

        def noting_failure(self, work: Callable[[], None]) -> None:
            try:
                work()
            except BaseException as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                raise

        def use_later(self, memory: torch.Tensor) -> None:
            """The compute stream reads `memory` at its own time and must find what the host sees now."""
            memory = memory.view(torch.uint8)
            now = memory.clone()

            def read() -> None:
                self.compute.nap()
                if not torch.equal(memory, now):
                    self.failures.append("memory was overwritten before the compute stream had read it")

            self.compute.put(lambda: self.noting_failure(read))

        def collective(self, group, work: Callable[[], None]) -> Future:
            """Run `work` on the group's stream, behind what the current stream holds."""
            if id(group) not in self.groups:
                self.groups[id(group)] = self.new_stream()
            before = self.record()

            def run() -> None:
                before.result()
                self.groups[id(group)].nap()
                work()

            return self.groups[id(group)].put(run)

        def close(self) -> None:
            for stream in self.streams:
                stream.thread.shutdown(wait=True)

    return LateDevice


@contextmanager
def late_device(seed: int, seconds: float, reads_at_once: bool = False) -> Iterator:
    """Models sharded inside run on a `LateDevice`, which is yielded; its `failures` tell what nobody may see."""
    from zerolite.offload.host_shard import HostShard
    from zerolite.runtime import collectives
    from zerolite.runtime import device as devices
    from zerolite.runtime.collectives import ExchangeGroup, Group, Pending
    from zerolite.shards.states import ShardState

    device = late_device_class()(random.Random(seed), seconds, reads_at_once)
    before = [
        (owner, name, getattr(owner, name))
        for owner, name in [
            (devices, "of"),
            (Group, "all_gather"),
            (ExchangeGroup, "all_gather"),
            (ExchangeGroup, "reduce_scatter"),
            (ExchangeGroup, "all_reduce"),
            (HostShard, "release"),
            (HostShard, "publish"),
        ]
    ]
    exchange = collectives.ExchangeGroup
    at_once = {name: getattr(exchange, name) for name in ("all_gather", "reduce_scatter", "all_reduce")}
    release_at_once, publish_at_once = HostShard.release, HostShard.publish

    def pending(group, name: str, *arguments) -> Pending:
        done = device.collective(group, lambda: at_once[name](group, *arguments).wait())

        def wait() -> None:
            device.wait(done)
            done.result()

        return Pending((wait,), arguments[:2], arguments[-1])

    def all_gather_alone(group, full, shard, label) -> Pending:
        if shard.data_ptr() != full.data_ptr():
            device.copy(full, shard)
        return Pending()

    def publish(shard) -> None:
        if shard.state is ShardState.STEPPING and shard.parameters.stays_unsharded:
            device.use_later(shard.parameters.unsharded)
        publish_at_once(shard)

    def release(shard):
        device.is_releasing = True
        try:
            return release_at_once(shard)
        finally:
            device.is_releasing = False

    devices.of = lambda torch_device: device
    Group.all_gather = all_gather_alone
    exchange.all_gather = lambda group, *arguments: pending(group, "all_gather", *arguments)
    exchange.reduce_scatter = lambda group, *arguments: pending(group, "reduce_scatter", *arguments)
    exchange.all_reduce = lambda group, tensor: device.collective(
        group, lambda: at_once["all_reduce"](group, tensor)
    ).result()
    HostShard.release, HostShard.publish = release, publish
    try:
        yield device
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        device.close()
