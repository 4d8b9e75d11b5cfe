"""The machine, the code and the time of a run, as its report tells them; the memory that it takes on the host."""

import contextlib
import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import torch
import transformers

import zerolite
from zerolite.medqa import processes
from zerolite.medqa.processes import Processes, without_secrets

GIT_S = 5.0


class HostMemory:
    """The resident memory of this process and of the optimizer workers that it has when this is made.

    Later children, as a tracker's, are not of the training. Children are looked for once: that reads all of /proc.
    """

    def __init__(self):
        own = psutil.Process()
        self.own, self.workers = own, own.children(recursive=True)

    def resident_bytes(self) -> int:
        """Private pages of all, and shared ones once: a rank and its workers map the same arena, each worker a part.

        What is shared is the rank's or its workers' together, whichever is more: either maps nearly all of it.
        """
        own, *workers = [usage for one in (self.own, *self.workers) if (usage := _memory(one)) is not None]
        shared = [getattr(usage, "shared", 0) for usage in (own, *workers)]
        private = sum(usage.rss - part for usage, part in zip((own, *workers), shared, strict=True))
        return private + max(shared[0], sum(shared[1:]))


def _memory(process: psutil.Process):
    try:
        return process.memory_info()
    except psutil.Error:  # a worker that ended
        return None


def mib(num_bytes: float) -> str:
    """With thousands separators; three digits behind the point where a model is tiny."""
    value = num_bytes / 2**20
    return f"{value:,.1f}" if value >= 10 or value == 0 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """As "3 min 20 s": two units at most."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds) % 60} s" if minutes else f"{int(seconds)} s"


def code_version() -> str:
    """The commit of the checkout that zerolite lies in, `+` where files differ from it; else its version."""
    root = Path(zerolite.__file__).parents[1]
    version = f"zerolite {zerolite.__version__}"
    if not (root / ".git").exists():
        return version
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=GIT_S, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another user
        return version
    return f"{version}, commit {commit}"


def hardware(device: torch.device) -> str:
    """The processor, cores that this process may use, memory, and the GPUs where `device` is one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = f"{psutil.virtual_memory().total / 2**30:.1f} GiB of memory"
    parts = [platform.system(), names[0] if names else platform.machine(), f"{cores} cores", memory]
    return ", ".join([*parts, _gpus(device)])


def library_versions(*more: str) -> dict[str, str]:
    """Of torch, transformers and CUDA, and of those of `more` that are installed."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    for name in more:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def about(processes: Processes, started: datetime.datetime, first_step: int, last_step: int) -> str:
    """A Markdown table of what ran where and for how long. `started`: with its time zone."""
    took_s = (datetime.datetime.now(datetime.timezone.utc) - started).total_seconds()
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    rows = {
        "command": f"`{without_secrets(_command())}`",
        "code": f"{code_version()}; Python {platform.python_version()}, {versions}",
        "machine": f"{hardware(processes.device)}; ranks: {processes.world_size}",
        "started": f"{started:%Y-%m-%d %H:%M:%S} UTC",
        "took": f"{duration(took_s)} for steps {first_step} to {last_step}, validations and the result",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in rows.items())])


def _command() -> str:
    return processes.launched(Path(sys.argv[0]).name, *sys.argv[1:])


def _gpus(device: torch.device) -> str:
    if device.type != "cuda":
        return "no GPU used"
    properties = torch.cuda.get_device_properties(device)
    return f"{torch.cuda.device_count()} x {properties.name} of {properties.total_memory / 2**30:.1f} GiB"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
