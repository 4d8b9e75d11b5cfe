"""What is chosen, refused or survived on machines with GPUs, with the driver's answers replaced: it needs none."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from limits import until
from simulated_device import simulated

import zerolite
from zerolite.errors import WorkerError
from zerolite.medqa import processes
from zerolite.offload.arena import Arena
from zerolite.runtime import abort
from zerolite.runtime import device as devices
from zerolite.runtime.collectives import NcclGroup


class OnGpu(torch.nn.Module):
    """A model that says it lies on a GPU."""

    def __init__(self, device: str):
        super().__init__()
        self.device = torch.device(device)

    def parameters(self, recurse=True):
        return [self]


@pytest.fixture
def machine(monkeypatch):
    """`machine(num_gpus, local_rank, backends)`: as it looks to this process."""

    def look(num_gpus: int, local_rank: int | None = None, backends: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setattr(dist, "is_initialized", lambda: backends is not None)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
        monkeypatch.setattr(dist, "get_backend_config", lambda group=None: backends)

    return look


@pytest.mark.parametrize(
    "num_gpus, local_rank, backends, expected",
    [
        (0, None, None, "cpu"),
        (0, 1, "cpu:gloo,cuda:gloo", "cpu"),
        (1, None, None, "cuda:0"),
        (4, None, None, "cuda:0"),
        (4, 3, None, "cuda:3"),
        (4, 3, "cuda:nccl", "cuda:3"),
        (4, 3, "cpu:gloo,cuda:nccl", "cuda:3"),
        (1, 3, "cuda:nccl", "cuda:0"),  # SLURM shows each task its own
        (4, 1, "cpu:gloo,cuda:gloo", "cpu"),  # started for the CPU
    ],
)
def test_a_model_on_the_cpu_goes_where_its_ranks_are(machine, num_gpus, local_rank, backends, expected):
    """To this rank's GPU where there is one, unless the process group was started for the CPU."""
    machine(num_gpus, local_rank, backends)
    assert devices.target(torch.nn.Linear(1, 1), None) == torch.device(expected)


@pytest.mark.parametrize("choose", [devices.default, processes.join])
def test_more_ranks_than_gpus_are_refused_by_both_numbers(machine, choose):
    machine(2, local_rank=5)
    with pytest.raises(ValueError, match="LOCAL_RANK is 5 and 2 GPUs are visible"):
        choose()
    machine(1, local_rank=5)
    assert devices.default() == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "told", "expected"),
    [
        (4, 1, "cuda:2", "cuda:2"),  # workers of two GPUs each: the second one's first
        (1, 3, "cuda:0", "cuda:0"),  # one GPU visible to each actor
        (2, 1, "cpu", "cpu"),  # ScalingConfig(use_gpu=False)
        (0, 1, "cpu", "cpu"),
        (4, 3, "cuda", "cuda:3"),  # says nothing
    ],
)
def test_a_worker_of_ray_train_has_the_gpu_that_ray_gave_it(machine, monkeypatch, num_gpus, local_rank, told, expected):
    """Every worker sees those of all workers of its machine, in the order of their numbers."""
    machine(num_gpus, local_rank)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", told)
    assert devices.target(torch.nn.Linear(1, 1), None) == torch.device(expected)


def test_a_model_on_a_gpu_needs_nccl(machine):
    """gloo would carry it too, through code that is not meant for it."""
    machine(2, 1, "cpu:gloo,cuda:gloo")
    with pytest.raises(ValueError, match='on cuda:1 and the process group was started with .*: start it with "nccl"'):
        devices.target(OnGpu("cuda:1"), None)
    machine(2, 1, "cpu:gloo,cuda:nccl")
    assert devices.target(OnGpu("cuda:1"), None) == torch.device("cuda:1")


@pytest.mark.parametrize(
    "dtype, size, op",
    [
        (torch.bfloat16, 2, "AVG"),
        (torch.bfloat16, 3, "SUM"),
        (torch.float32, 6, "SUM"),
        (torch.float32, 8, "AVG"),
        (torch.float16, 3, "AVG"),  # its sum could leave the range
    ],
)
def test_nccl_divides_before_it_adds_only_where_that_is_exact(monkeypatch, dtype, size, op):
    """At 3, 5, 6, 7 ranks AVG rounds each term once more than a division of the sum, which the CPU does."""
    seen = []

    def reduce_scatter(out, full, op, group, async_op):
        seen.append(op)
        out.copy_(full[: out.numel()] * (1 if op == dist.ReduceOp.AVG else size))  # of ranks that hold the same
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "reduce_scatter_tensor", reduce_scatter)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: size)
    out = torch.zeros(4, dtype=dtype)
    NcclGroup(None).reduce_scatter(torch.full((4 * size,), 0.5, dtype=dtype), out, size, "").wait()
    assert seen == [getattr(dist.ReduceOp, op)] and out.tolist() == [0.5] * 4


def test_buffers_are_contiguous_before_they_are_broadcast():
    """NCCL refuses others."""
    model = torch.nn.Linear(2, 2)
    model.register_buffer("table", torch.arange(6.0).view(2, 3).T)
    model.register_buffer("same", torch.ones(()).expand(4))
    zerolite.shard(model, stage=0)
    assert all(buffer.is_contiguous() for buffer in model.buffers())
    assert model.table.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_only_what_is_copied_is_pinned():
    """Parameters and gradients, 2 + 4 bytes a parameter in bf16: not the masters, the moments, and their sums."""
    with simulated() as order:
        model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3)))
        model = zerolite.shard(model, 2, None, zerolite.Offload(threads=1), zerolite.Precision(torch.bfloat16))
        optimizer = zerolite.AdamW(model.parameters())
        for _ in range(2):
            model(torch.ones(1, 32)).sum().backward()
        optimizer.step()
        engine = model._zerolite
        numel = sum(bucket.layout.numel for unit in engine.units for bucket in unit.buckets)
        assert engine.device.pinned_bytes == 6 * numel < engine.placement.host_bytes / 2
        list(model.parameters())
    assert order.findings == set()


class Driver(devices.Cuda):
    """Its registrations fail from the `num_good`-th on, or every one's end."""

    def __init__(self, num_good: int, ends_badly: bool = False):
        self.num_good, self.ends_badly, self.tried, self.ended = num_good, ends_badly, 0, 0
        super().__init__(0)

    def _clear_error(self) -> None:
        pass

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.tried += 1
        return 0 if self.tried <= self.num_good else 801

    def cudaHostUnregister(self, address: int) -> int:
        self.ended += 1
        return 700 if self.ends_badly else 0


@pytest.fixture
def cuda(monkeypatch):
    """`cuda(driver)`: torch.cuda with that driver behind it."""

    def use(driver: Driver) -> Driver:
        monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "CudaError", lambda code: f"error {code}", raising=False)
        return driver

    return use


def test_memory_that_cannot_be_pinned_is_a_warning_with_its_bytes(cuda):
    """One, not one a tensor; what was pinned before is released, what was not is not."""
    driver = cuda(Driver(num_good=2))
    arena = Arena(driver)
    with pytest.warns(UserWarning, match="cannot lock 4,000 bytes of host memory .*801.*right, but slower") as warned:
        for _ in range(5):
            arena.pin(arena.allocate(1000, torch.float32))
    assert len(warned) == 1 and driver.tried == 3
    arena.close()
    assert driver.ended == 2


def test_the_arena_closes_where_the_driver_fails(cuda):
    """Every tensor is tried, and the descriptor is closed."""
    driver = cuda(Driver(num_good=9, ends_badly=True))
    arena = Arena(driver)
    for _ in range(3):
        arena.pin(arena.allocate(10, torch.float32))
    with pytest.raises(RuntimeError, match="cannot unlock host memory"):
        arena.close()
    assert driver.ended == 3
    with pytest.raises(OSError):
        os.fstat(arena.fd)


def numbers_after_a_failure() -> str:
    """What a rank reads of NCCL's collective when another rank has failed: the abort ends the wait, not the read."""
    abort.listen(0.5)
    group = NcclGroup(dist.group.WORLD)
    dist.barrier()
    if group.rank == 1:
        abort.publish("worker 0 of rank 1 is dead")
        return ""
    until(abort.has_failed, 20.0)
    dist.all_gather_into_tensor, kept = lambda *args, **keywords: None, dist.all_gather_into_tensor
    try:
        group.all_gather_scalars(torch.zeros(3))
    except WorkerError as error:
        return str(error)
    finally:
        dist.all_gather_into_tensor = kept
    return "garbage"


def test_an_aborted_collective_is_no_result(ranks):
    assert ranks(2).run(numbers_after_a_failure)[0] == "worker 0 of rank 1 is dead"
