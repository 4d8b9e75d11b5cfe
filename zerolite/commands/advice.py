"""What will be slow, or will not work, on a machine: one line each with why and what to do."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from zerolite.commands.command_line import bytes_told

GIB = 1 << 30
TOPOLOGY_ACROSS = "across NUMA nodes"  # as gpus.py says it


class Advice(NamedTuple):
    is_broken: bool  # something does not work; else something is slower than it could be
    what: str
    remedy: str


def advice(found: dict[str, Any]) -> list[Advice]:
    """`found`: what `zerolite doctor` has gathered. What is broken comes first."""
    parts = (_versions, _cores, _memory, _offload, _gpus, _links, _rates, _disks)
    return sorted((one for part in parts for one in part(found)), key=lambda one: not one.is_broken)


def _versions(found: dict[str, Any]) -> Iterator[Advice]:
    versions, has_gpus = found["versions"], bool(found["gpu"].get("gpus"))
    for name in ("torch", "transformers", "safetensors"):
        if versions[name] is None:
            yield Advice(True, f"{name} is not installed", f"pip install {name}")
    if has_gpus and versions["torch"] is not None and versions["CUDA of torch"] is None:
        yield Advice(
            True, "torch is a build for the CPU, and there is a GPU", "install torch's CUDA build (pytorch.org)"
        )
    built, driver = versions["CUDA of torch"], found["gpu"].get("cuda")
    if built and driver and int(built.split(".")[0]) > int(driver.split(".")[0]):
        yield Advice(
            True,
            f"torch is built for CUDA {built}, and the driver goes up to {driver}",
            "install a newer driver, or torch's build for an older CUDA",
        )
    if has_gpus and versions["triton"] is None:
        yield Advice(False, "triton is missing: adapters and losses run torch's formulas", "pip install triton")
    if has_gpus and found["environment"].get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Advice(
            True, "CUDA_VISIBLE_DEVICES hides every GPU: training runs on the CPU", "unset CUDA_VISIBLE_DEVICES"
        )


def _cores(found: dict[str, Any]) -> Iterator[Advice]:
    cpu = found["cpu"]
    allowed, there = len(cpu["allowed_cores"]), cpu["logical_cores"] or 1
    if allowed < there:
        yield Advice(
            False,
            f"this process may run on {allowed} of {there} cores: offloaded steps have no more",
            "start it without taskset, or give the container more cores (docker --cpuset-cpus)",
        )
    quota = cpu["quota_cores"]
    if quota is not None and quota < allowed:
        yield Advice(
            False,
            f"the control group gives {quota:.1f} cores' worth of time to {allowed} cores: threads are put to sleep",
            "raise docker --cpus (Kubernetes: limits.cpu), or pass Offload(threads=) to match",
        )
    num_gpus = len(found["gpu"].get("gpus", ()))
    physical = cpu["physical_cores_allowed"]
    if num_gpus and physical < 4 * num_gpus:
        yield Advice(
            False,
            f"{physical} cores for {num_gpus} GPUs: with offload the host step is what a step waits for",
            "offload less (Offload(budget=)), or use a machine with more cores",
        )
    if found["environment"].get("OMP_NUM_THREADS") == "1" and allowed > 1:
        yield Advice(
            False,
            "OMP_NUM_THREADS is 1 (torchrun sets it): torch's own work on the CPU has one thread; offload has its own",
            f"export OMP_NUM_THREADS={max(1, allowed // max(1, num_gpus))} where the CPU prepares data or trains",
        )


def _memory(found: dict[str, Any]) -> Iterator[Advice]:
    memory, limits = found["memory"], found["limits"]
    if memory["limit"] is not None and memory["limit"] < 0.9 * memory["total"]:
        yield Advice(
            False,
            f"the control group may use {bytes_told(memory['limit'])} of {bytes_told(memory['total'])}, offload too",
            "raise docker --memory (Kubernetes: limits.memory)",
        )
    if limits.get("shm_bytes") is not None and limits["shm_bytes"] < GIB:
        yield Advice(
            False,
            f"/dev/shm has {bytes_told(limits['shm_bytes'])}: a DataLoader's workers and NCCL share memory there",
            "docker --shm-size=8g (Kubernetes: an emptyDir of medium Memory)",
        )
    if limits["open_files"] is not None and limits["open_files"] < 4096:
        yield Advice(
            False, f"a process may open {limits['open_files']:,} files: many ranks need more", "ulimit -n 65536"
        )


def _offload(found: dict[str, Any]) -> Iterator[Advice]:
    kernels = found["kernels"]
    if kernels["error"] is not None:
        yield Advice(True, f"the C++ kernels do not load: {kernels['error']}", "pip install -e . again")
    elif not kernels["built"]:
        yield Advice(
            False,
            "the C++ kernels are not built: the host step is torch's, several times slower",
            "install a C++ compiler (apt-get install g++), then pip install again",
        )
    elif kernels["path"] == "plain":
        yield Advice(False, "the host step runs without AVX2: this processor has none", "do not offload, if you can")
    for name, why in found["offload_calls"].items():
        if why is not None:
            yield Advice(
                True, f"offload needs {name}, which is not to be had: {why}", "Linux 5.3 or later, and Docker 20.10"
            )
    if found["is_wsl"]:
        yield Advice(False, "WSL2: host memory cannot be pinned in place, copies are slower", "train on Linux itself")


def _gpus(found: dict[str, Any]) -> Iterator[Advice]:
    for gpu in found["gpu"].get("gpus", ()):
        name = f"GPU {gpu['index']} ({gpu['name']})"
        width, widest = gpu["pcie_width"], gpu["pcie_max_width"]
        if width and widest and width < widest:
            yield Advice(
                False,
                f"{name} is on {width} of {widest} PCIe lanes: offload copies at 1/{widest / width:.0f} of its rate",
                "put it into another slot, or look for a riser or a switch between",
            )
        if gpu["capability"] < [8, 0]:
            yield Advice(False, f"{name} has no bf16", "use zerolite.Precision(torch.float16)")
        if gpu["free"] < 0.9 * gpu["bytes"]:
            used = bytes_told(gpu["bytes"] - gpu["free"])
            yield Advice(False, f"{name}: {used} are in use by others", "nvidia-smi shows by whom")


def _links(found: dict[str, Any]) -> Iterator[Advice]:
    slow = [link for link in found["gpu"].get("links", ()) if not link["nvlinks"]]
    if slow:
        pairs = len(found["gpu"]["links"])
        yield Advice(
            False,
            f"{len(slow)} of {pairs} pairs of GPUs have no NVLink: stage 3 sends 1.5 times stage 2's bytes over PCIe",
            "prefer stage 2 where it fits, with accumulation (no_sync), or Offload at stage 2",
        )
    across = [link for link in slow if link["path"] == TOPOLOGY_ACROSS]
    if across:
        yield Advice(
            False,
            f"{len(across)} of {len(found['gpu']['links'])} pairs of GPUs are on different NUMA nodes",
            "keep ranks of one model on one node: CUDA_VISIBLE_DEVICES",
        )


def _rates(found: dict[str, Any]) -> Iterator[Advice]:
    rates = found.get("rates")
    if found.get("rates_error"):
        yield Advice(True, f"measuring failed: {found['rates_error']}", "run a small program of torch on this device")
    if rates is None:
        return
    load, there = found["cpu"]["load"], found["cpu"]["logical_cores"] or 1
    if load > there:
        yield Advice(
            False,
            f"others are at work here (load {load:.1f} on {there} cores): rates are measured too low",
            "measure again on a quiet machine",
        )
    matmul = rates["matmul_flop_per_s"]
    best = max(matmul, key=matmul.__getitem__) if matmul else "fp32"
    for name in ("bf16", "fp16"):
        if name in matmul and matmul[name] < 0.8 * matmul.get("fp32", 0.0):
            ratio = matmul["fp32"] / matmul[name]
            yield Advice(
                False, f"{name} is {ratio:.1f} times slower than fp32 on {rates['device']}", f"train in {best}"
            )
    slowest = min(filter(None, (rates["h2d_bytes_per_s"], rates["d2h_bytes_per_s"])), default=None)
    if slowest is not None and slowest < 10e9:
        yield Advice(
            False,
            f"copies between host and GPU run at {slowest / 1e9:.1f} GB/s: offload moves 4 bytes a parameter each step",
            "look at the PCIe lanes above; accumulate more micro-batches a step",
        )
        locked = found["limits"]["locked_memory"]
        if locked is not None and locked < GIB:
            yield Advice(
                False,
                f"a process may lock {bytes_told(locked)}, and copies are slow: a driver that keeps to it pins no more",
                "ulimit -l unlimited (docker --ulimit memlock=-1)",
            )


def _disks(found: dict[str, Any]) -> Iterator[Advice]:
    for disk in found["disks"]:
        if disk["free"] < 10 * GIB:
            yield Advice(
                False,
                f"{disk['path']} has {bytes_told(disk['free'])} free: a checkpoint takes 12 to 16 bytes a parameter",
                "remove old checkpoints, or write to another drive",
            )
