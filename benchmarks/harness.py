"""What every benchmark here shares: fresh ranks, clocks, counters of memory and of bytes sent, the machine's facts.

A benchmark script defines a worker function and calls `launch(worker, arguments, ranks)`: the worker runs in `ranks`
fresh processes of one thread each, inside a process group (gloo on the CPU, NCCL where there is a GPU), and what each
rank returns comes back as a list. This file is also the program those processes run; it is not started by hand.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import inspect
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

import psutil
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20
RESULTS = Path(__file__).parent / "results"


# --- the device, decided once ---------------------------------------------------------------------------------------


class Cpu:
    """Main memory is what the process really holds: PSS, and the high-water mark of RSS."""

    type, backend, memory = "cpu", "gloo", "PSS"
    synchronize = staticmethod(lambda: None)

    @staticmethod
    def used_bytes() -> int:
        return _kilobytes("/proc/self/smaps_rollup", "Pss:")

    @staticmethod
    def peak_bytes() -> int:
        return _kilobytes("/proc/self/status", "VmHWM:")

    @staticmethod
    def reset_peak() -> None:
        Path("/proc/self/clear_refs").write_text("5")


class Cuda:
    """Device memory is what torch's allocator has handed out."""

    type, backend, memory = "cuda", "cpu:gloo,cuda:nccl", "allocated"  # gloo: FSDP2 clips offloaded gradients with it
    synchronize = staticmethod(torch.cuda.synchronize)
    used_bytes = staticmethod(torch.cuda.memory_allocated)
    peak_bytes = staticmethod(torch.cuda.max_memory_allocated)
    reset_peak = staticmethod(torch.cuda.reset_peak_memory_stats)


DEVICE = Cuda if torch.cuda.is_available() else Cpu


def _kilobytes(path: str, field: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{path} has no field {field}")


# --- fresh processes ------------------------------------------------------------------------------------------------


class RankError(RuntimeError):
    """A rank ended badly; the message is the end of what it printed."""


def launch(worker: Callable, arguments: dict, ranks: int, env: dict | None = None, timeout: float = 3600) -> list:
    """Run worker(**arguments) on `ranks` fresh processes; return each rank's result (JSON values), in rank order.

    `env` may raise OMP_NUM_THREADS, which is 1 and what torch and every library get.
    """
    with tempfile.TemporaryDirectory(prefix="zerolite-bench-") as name:
        folder = Path(name)
        (folder / "arguments.json").write_text(json.dumps(arguments))
        script = str(Path(inspect.getfile(worker)).resolve())
        logs = [open(folder / f"{rank}.log", "w") for rank in range(ranks)]
        processes = [
            start_rank(
                script,
                worker.__name__,
                name,
                os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
                | (env or {}),
                log,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            _wait(processes, folder, time.monotonic() + timeout)
        finally:
            for process, log in zip(processes, logs, strict=True):
                _end(process)
                log.close()
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def _end(process: subprocess.Popen) -> None:
    """Kill a rank, unless it has ended, and what it has started: a compiler would go on, and hold its lock."""
    if process.poll() is None:
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()


def start_rank(script: str, function: str, folder: str, environment: Mapping[str, str], log: IO) -> subprocess.Popen:
    """A fresh interpreter that runs `run_worker`."""
    command = [sys.executable, __file__, script, function, folder]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _wait(processes: list[subprocess.Popen], folder: Path, deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            raise RankError("the ranks did not end in time")
        if any(process.poll() for process in processes):
            break
        time.sleep(0.1)
    for rank, process in enumerate(processes):
        if process.poll():
            tail = (folder / f"{rank}.log").read_text().strip().splitlines()[-15:]
            raise RankError(f"rank {rank} ended with exit code {process.returncode}:\n" + "\n".join(tail))


def run_worker(script: Path, function: str, folder: Path) -> None:
    """The body of one launched process. Ends with os._exit: gloo's threads can abort a plain interpreter exit."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if DEVICE is Cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(DEVICE.backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    sys.path.insert(0, str(script.parent))
    worker = getattr(importlib.import_module(script.stem), function)
    result = worker(**json.loads((folder / "arguments.json").read_text()))
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


# --- what is measured, inside a rank --------------------------------------------------------------------------------


def seconds(step: Callable[[], None]) -> float:
    """Wall time of one step, barrier to barrier. Collective."""
    dist.barrier()
    DEVICE.synchronize()
    start = time.perf_counter()
    step()
    DEVICE.synchronize()
    dist.barrier()
    return time.perf_counter() - start


def pss_bytes() -> int:
    """What this process and its children hold of main memory, a shared page's bytes divided among its holders."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(_kilobytes(f"/proc/{process.pid}/smaps_rollup", "Pss:") for process in processes)


def tensor_bytes() -> int:
    """Bytes of the live tensors on the device, each storage once, as Python's objects show them.

    Buffers that only C++ holds (DDP's buckets, what autograd saved) stay unseen, so this is a lower bound; freed pages
    that the allocator keeps are not counted, so it is what the algorithm needs.
    """
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        # A DTensor has no storage of its own; its local tensor is found by itself.
        if not issubclass(type(found), torch.Tensor) or hasattr(found, "_local_tensor"):
            continue
        for tensor in (found, found.grad if found.is_leaf else None):
            if tensor is not None and not hasattr(tensor, "_local_tensor") and tensor.device.type == DEVICE.type:
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


class SentBytes(TorchDispatchMode):
    """Count the bytes that a rank sends, by collective, while the context is open; every c10d call passes through here,
    those that DDP makes from C++ too.

    A collective counts what a ring sends per rank (n ranks): all-reduce 2(n-1)/n of the tensor, all-gather, reduce-
    scatter, broadcast and all-to-all (n-1)/n; a point-to-point send counts itself.
    """

    _SHARE = {  # op -> (which argument holds the whole tensor, or each rank's part; its share sent by a rank)
        "allreduce_": (0, lambda n: 2 * (n - 1) / n),
        "allreduce_coalesced_": (0, lambda n: 2 * (n - 1) / n),
        "allgather_": (1, lambda n: n - 1),
        "_allgather_base_": (1, lambda n: n - 1),
        "allgather_into_tensor_coalesced_": (1, lambda n: n - 1),
        "reduce_scatter_": (0, lambda n: n - 1),
        "_reduce_scatter_base_": (0, lambda n: n - 1),
        "reduce_scatter_tensor_coalesced_": (0, lambda n: n - 1),
        "broadcast_": (0, lambda n: (n - 1) / n),
        "reduce_": (0, lambda n: (n - 1) / n),
        "alltoall_": (1, lambda n: (n - 1) / n),
        "alltoall_base_": (1, lambda n: (n - 1) / n),
        "send": (0, lambda n: 1),
        "recv_": (0, lambda n: 0),
        "barrier": (0, lambda n: 0),
    }

    def __init__(self):
        super().__init__()
        self.by_op = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            argument, share = self._SHARE[name]
            tensors = [args[argument]] if isinstance(args[argument], torch.Tensor) else args[argument]
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            self.by_op[name] += int(share(group.size()) * sum(tensor.nbytes for tensor in tensors))
        return func(*args, **(kwargs or {}))


class BusBytes(TorchDispatchMode):
    """Count the bytes of copies between host and device, while the context is open."""

    def __init__(self):
        super().__init__()
        self.down = self.up = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy):
            source, target = (args[1], args[0]) if func.overloadpacket is torch.ops.aten.copy_ else (args[0], result)
            if source.device.type != target.device.type:
                self.down += target.nbytes * (target.device.type == "cpu")
                self.up += target.nbytes * (target.device.type != "cpu")
        return result


# --- what is written ------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def version(package: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_facts(packages: tuple[str, ...]) -> dict:
    """What a number needs beside it: machine, versions, commit, date and command. No host names, no absolute paths."""
    models = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    commit = ""
    if shutil.which("git"):
        git = ["git", "--no-optional-locks", "describe", "--always", "--dirty"]
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    script = os.path.relpath(Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1])
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * resource.getpagesize() / 2**30, 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "commit": commit or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", script, *words]),
    }


def facts_markdown(facts: dict) -> str:
    gpu = f"{facts['gpus']} x {facts['gpu']}" if facts["gpu"] else "no GPU"
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in facts["versions"].items())
    return (
        f"{facts['date']} · commit {facts['commit']} · `{facts['command']}`\n\n"
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {gpu}; load average at the start "
        f"{facts['load_average']} · Python {facts['python']}, {versions}"
    )


def markdown_table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_report(folder: Path, name: str, report: dict, text: str) -> Path:
    """Write name.json and name.md into a folder; the path that more files of the report share, without a suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    target.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    target.with_suffix(".md").write_text(text)
    return target


def bar_panels(path: Path, title: str, panels: list[dict]) -> None:
    """One horizontal bar chart a panel: {"title", "labels", "values", "marks" (a tick a bar, or None), "legend"}.

    A bar whose label starts with zerolite stands out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tallest = max(len(panel["labels"]) for panel in panels)
    size = (6 * len(panels), 1.4 + 0.38 * tallest)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        colors = ["#c2410c" if label.startswith("zerolite") else "#94a3b8" for label in panel["labels"]]
        positions = range(len(panel["labels"]))
        axis.barh(positions, panel["values"], color=colors)
        ends = [max(pair) for pair in zip(panel["values"], panel["marks"] or panel["values"], strict=True)]
        for position, value, end in zip(positions, panel["values"], ends, strict=True):
            axis.annotate(f"{value:.2f}", (end, position), (5, 0), textcoords="offset points", va="center")
        if panel["marks"]:
            axis.plot(panel["marks"], positions, "k|", markersize=16, markeredgewidth=2, label=panel["legend"])
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False)
        axis.set_yticks(positions, panel["labels"])
        axis.invert_yaxis()
        axis.set_title(panel["title"])
        axis.set_xlim(0, 1.15 * max(ends))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_worker(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
