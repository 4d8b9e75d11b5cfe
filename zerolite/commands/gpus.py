"""The GPUs of this machine through NVIDIA's management library (nvidia-ml-py), which works without a CUDA context."""

import contextlib
from pathlib import Path
from typing import Any

MAX_LINKS = 18  # of NVLink, on any GPU so far
TOPOLOGY = {  # of pynvml's numbers: what two GPUs have in common, the nearest first
    0: "one board", 10: "one PCIe switch", 20: "several PCIe switches", 30: "one PCIe host bridge", 40: "one NUMA node",
    50: "across NUMA nodes",
}  # fmt: skip


def gpus() -> dict[str, Any]:
    """{"driver", "cuda", "gpus", "links"}, or {"absent": why} where there is none to ask."""
    try:
        import pynvml
    except ImportError:
        return {"absent": "nvidia-ml-py is not installed: pip install nvidia-ml-py"}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"absent": f"the NVIDIA driver does not answer ({error})"}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        found = [_gpu(pynvml, index, handle) for index, handle in enumerate(handles)]
        if not found:
            return {"absent": "the NVIDIA driver answers, and has no GPU"}
        cuda = _ask(pynvml, pynvml.nvmlSystemGetCudaDriverVersion_v2)
        return {
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
            "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,  # the newest that it can run
            "gpus": found,
            "links": _links(pynvml, handles, found),
        }
    except pynvml.NVMLError as error:
        return {"absent": f"the NVIDIA driver does not answer ({error})"}
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _gpu(pynvml, index: int, handle) -> dict[str, Any]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    pci = _ask(pynvml, pynvml.nvmlDeviceGetPciInfo, handle)
    bus = _text(getattr(pci, "busId", ""))
    return {
        "index": index,
        "name": _text(pynvml.nvmlDeviceGetName(handle)),
        "bytes": int(memory.total),
        "free": int(memory.free),
        "capability": list(_ask(pynvml, pynvml.nvmlDeviceGetCudaComputeCapability, handle) or (0, 0)),
        "pci": bus,
        "pcie_generation": _ask(pynvml, pynvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        "pcie_max_generation": _ask(pynvml, pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        "pcie_width": _ask(pynvml, pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        "pcie_max_width": _ask(pynvml, pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        "numa_node": _numa_node(bus),
        "nvlinks": _nvlinks(pynvml, handle),
    }


def _text(value: str | bytes) -> str:
    """Older releases of the library give bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _ask(pynvml, function, *arguments):
    """None where this GPU, or this driver, does not tell."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def _numa_node(bus: str) -> int | None:
    """Of a PCI device; the system writes -1 where there is one node."""
    name = bus.lower()[-12:]  # the management library writes a domain of 8 digits, the system one of 4
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/sys/bus/pci/devices/{name}/numa_node").read_text())
    return None


def _nvlinks(pynvml, handle) -> list[str]:
    """The PCI address at the other end of every active link."""
    found = []
    for link in range(MAX_LINKS):
        if _ask(pynvml, pynvml.nvmlDeviceGetNvLinkState, handle, link) == 1:
            remote = _ask(pynvml, pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
            found.append(_text(getattr(remote, "busId", "")))
    return found


def _links(pynvml, handles: list, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Between every two GPUs: NVLink, through a switch or directly, or what of PCIe they share."""
    links = []
    addresses = {gpu["pci"] for gpu in found}
    for first, one in enumerate(found):
        for second in range(first + 1, len(found)):
            direct = sum(address == found[second]["pci"] for address in one["nvlinks"])
            switched = min(sum(address not in addresses for address in gpu["nvlinks"]) for gpu in (one, found[second]))
            level = _ask(pynvml, pynvml.nvmlDeviceGetTopologyCommonAncestor, handles[first], handles[second])
            links.append(
                {
                    "between": [first, second],
                    "nvlinks": direct or switched,
                    "path": TOPOLOGY.get(int(level), f"level {level}") if level is not None else "not told",
                }
            )
    return links
