"""What this machine and process have: versions, cores, memory, limits, disks, C++ kernels. Imports no torch."""

import contextlib
import importlib.util
import os
import platform
import re
import resource
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from zerolite.version import __version__

LIBRARIES = ("torch", "triton", "transformers", "safetensors", "numpy", "accelerate", "peft")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "NCCL_P2P_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
)
PROC, SYS = Path("/proc"), Path("/sys")
UNLIMITED = 1 << 60  # bytes; cgroups of version 1 write a number near 2 ** 63 for none


def versions() -> dict[str, str | None]:
    """None for what is not installed."""
    found: dict[str, str | None] = {"zerolite": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        found[name] = _version(name)
    found["CUDA of torch"] = _torch_cuda()
    found["NCCL of torch"] = next(filter(None, (_version(f"nvidia-nccl-cu{major}") for major in (13, 12, 11))), None)
    return found


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _torch_cuda() -> str | None:
    """From torch's version.py: importing torch takes over a second. None: a build for the CPU."""
    with contextlib.suppress(ImportError, AttributeError, OSError, TypeError):
        file = Path(importlib.util.find_spec("torch").origin).with_name("version.py")  # type: ignore[union-attr, arg-type]
        match = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", file.read_text(encoding="utf-8"), re.MULTILINE)
        return match[1] if match else None
    return None


def processor() -> dict[str, Any]:
    """The processor, and which of its cores this process may use."""
    text = _read(PROC / "cpuinfo") or ""
    names = re.findall(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = set((re.findall(r"^flags\s*: (.*)$", text, re.MULTILINE) or [""])[0].split())
    allowed = sorted(os.sched_getaffinity(0))
    return {
        "name": names[0].strip() if names else platform.machine(),
        "logical_cores": os.cpu_count(),
        "allowed_cores": allowed,
        "physical_cores_allowed": len({_core_of(core) for core in allowed}),
        "quota_cores": _cpu_quota(),
        "load": round(os.getloadavg()[0], 2),  # processes that ran or waited, over the last minute
        "numa_nodes": numa_nodes(),
        "instructions": [flag for flag in FLAGS if flag in flags],
    }


def _core_of(core: int) -> str:
    """The hardware threads that share its physical core."""
    return _read(SYS / f"devices/system/cpu/cpu{core}/topology/thread_siblings_list") or str(core)


def numa_nodes() -> list[dict[str, Any]]:
    found = []
    for path in sorted(SYS.glob("devices/system/node/node[0-9]*"), key=lambda path: int(path.name[4:])):
        match = re.search(r"MemTotal:\s+(\d+) kB", _read(path / "meminfo") or "")
        cores = (_read(path / "cpulist") or "").strip()
        found.append({"node": int(path.name[4:]), "cores": cores, "bytes": int(match[1]) << 10 if match else None})
    return found


def _cgroup_files(controller: str, name: str) -> list[str]:
    """A file of this process's control group and of those above it, of version 2 or 1; the least limit counts.

    In a container the group's path is often not to be seen, and the root is its own.
    """
    found = []
    for line in (_read(PROC / "self/cgroup") or "").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        is_v1 = controller in controllers.split(",")
        if not is_v1 and controllers:
            continue
        root = SYS / "fs/cgroup" / controllers
        folder = root / path.lstrip("/")
        for one in (folder, *(above for above in folder.parents if root in (above, *above.parents))):
            found.append(_read(one / name))
        if is_v1:
            found.append(_read(SYS / "fs/cgroup" / controller / name))
    return [text.strip() for text in found if text is not None]


def _cpu_quota() -> float | None:
    """Cores' worth of time that the control group may use; None: no limit."""
    pairs = [text.split() for text in _cgroup_files("cpu", "cpu.max")]
    v1 = (_cgroup_files("cpu", f"cpu.cfs_{what}_us") for what in ("quota", "period"))
    pairs += [list(pair) for pair in zip(*v1, strict=False)]
    quotas = [int(quota) / int(period) for quota, period in pairs if quota.isdigit() and int(quota) > 0]
    return min(quotas, default=None)


def memory() -> dict[str, Any]:
    """Bytes. `limit`: of the control group, None where it has none."""
    found = psutil.virtual_memory()
    texts = [*_cgroup_files("memory", "memory.max"), *_cgroup_files("memory", "memory.limit_in_bytes")]
    sizes = [int(text) for text in texts if text.isdigit() and int(text) < UNLIMITED]
    swap = psutil.swap_memory().total
    return {"total": found.total, "available": found.available, "limit": min(sizes, default=None), "swap": swap}


def limits() -> dict[str, Any]:
    """What the system gives to a process; None: no limit."""
    names = {"locked_memory": "MEMLOCK", "open_files": "NOFILE", "processes": "NPROC", "file_bytes": "FSIZE"}
    found: dict[str, Any] = {}
    for name, constant in names.items():
        soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{constant}"))
        found[name] = None if soft == resource.RLIM_INFINITY else soft
    with contextlib.suppress(OSError):
        found["shm_bytes"] = shutil.disk_usage("/dev/shm").total
    return found


def offload_calls() -> dict[str, str | None]:
    """What offload needs of the kernel; None: it is there, else why not."""
    found: dict[str, str | None] = {}
    for name, attempt in (
        ("memfd_create", lambda: os.memfd_create("zerolite-doctor")),
        ("eventfd", lambda: os.eventfd(0)),
        ("pidfd_open", lambda: os.pidfd_open(os.getpid())),
    ):
        try:
            os.close(attempt())
            found[name] = None
        except (OSError, AttributeError) as error:
            found[name] = str(error)
    return found


def kernels() -> dict[str, Any]:
    """The C++ kernels of the host step: whether they are built, and which instructions they run on."""
    from zerolite_kernels import cpu

    try:
        library = cpu.load()
    except (ImportError, OSError) as error:
        return {"built": False, "path": None, "error": str(error)}
    return {
        "built": library is not None,
        "path": library.zl_path().decode() if library is not None else None,
        "error": None,
    }


def disks() -> list[dict[str, Any]]:
    found = []
    for name, path in (("working folder", Path.cwd()), ("temporary files", Path(os.environ.get("TMPDIR", "/tmp")))):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(path)
            found.append({"what": name, "path": str(path), "free": usage.free, "total": usage.total})
    return found


def environment() -> dict[str, str]:
    """Variables that change what is used, where they are set."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def is_wsl() -> bool:
    return "microsoft" in (_read(PROC / "version") or "").lower()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
