"""`zerolite doctor`: is what it tells of the machine so, and does it see what makes training slow?"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import zerolite_kernels.cpu
from paths import ROOT
from programs import Program

import zerolite
from zerolite import cli
from zerolite.commands import doctor, gpus, machine
from zerolite.commands.advice import advice
from zerolite.memory import measured_rates
from zerolite.memory.rates import Rates

GIB = 1 << 30


def asked(capsys, *options: str) -> tuple[int, dict]:
    status = cli.main(["doctor", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


def test_what_it_tells_is_what_the_system_says(capsys):
    """Versions, cores, memory, the kernels and their path, free disk."""
    status, found = asked(capsys, "--no_measure")
    assert found["versions"]["zerolite"] == zerolite.__version__ and found["versions"]["torch"] == torch.__version__
    assert found["versions"]["CUDA of torch"] == torch.version.cuda
    assert found["cpu"]["allowed_cores"] == sorted(os.sched_getaffinity(0))
    assert found["cpu"]["physical_cores_allowed"] <= len(os.sched_getaffinity(0)) <= found["cpu"]["logical_cores"]
    assert found["memory"]["total"] == psutil.virtual_memory().total
    library = zerolite_kernels.cpu.load()
    assert found["kernels"]["built"] is (library is not None)
    assert library is None or found["kernels"]["path"] == library.zl_path().decode()
    assert set(found["offload_calls"].values()) == {None} and found["disks"][0]["path"] == str(Path.cwd())
    assert status == 0 and found["rates"] is None


def test_measured_rates_are_numbers_that_come_back(capsys):
    """Each is positive; `Rates` reads what is printed, and refuses what is no rate."""
    _, found = asked(capsys)
    took_s = found["rates_took_s"]
    rates = Rates.from_json(found["rates"])
    assert rates.as_json() == found["rates"] and took_s > 0 and rates.device == "cpu"
    assert set(rates.matmul_flop_per_s) == {"fp32", "bf16", "fp16"} and rates.h2d_bytes_per_s is None
    for name, value in [("host_copy_bytes_per_s", -1), ("num_ranks", "two"), ("matmul_flop_per_s", {"bf16": 0})]:
        with pytest.raises(ValueError, match=name):
            Rates.from_json({**found["rates"], name: value})
    with pytest.raises(ValueError, match="'speed' is unknown"):
        Rates.from_json({**found["rates"], "speed": 1.0})
    with pytest.raises(ValueError, match="'device' is absent"):
        Rates.from_json({"num_ranks": 1})


def test_a_rate_is_work_over_time(monkeypatch):
    """With a clock of our own: a copy that takes 0.01 s is 100 buffers a second, a product 2 n^3 FLOP."""
    now = 0.0

    def clock() -> float:
        return now

    class Slow(measured_rates.devices.Cpu):
        def copy(self, target, source):
            nonlocal now
            now += 0.01

    monkeypatch.setattr(measured_rates.time, "perf_counter", clock)
    buffer = torch.zeros(1000, dtype=torch.uint8)
    assert measured_rates._copy(Slow(), buffer, buffer, 0.05) == pytest.approx(1000 / 0.01)

    def product(left, right):
        nonlocal now
        now += 0.02
        return left

    monkeypatch.setattr(torch, "matmul", product)
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert measured_rates._matmul(Slow(), torch.float32, 0.03) == pytest.approx(2 * 256**3 / 0.02)


@pytest.mark.gpu
def test_rates_of_a_gpu_are_those_of_a_gpu():
    """Copies over the bus, in its memory, and products that no processor reaches."""
    rates = measured_rates.measure_rates(0.05)
    assert rates.device == torch.cuda.get_device_name() and rates.matmul_flop_per_s["fp16"] > 5e12
    assert min(rates.h2d_bytes_per_s, rates.d2h_bytes_per_s) > 1e9
    assert rates.device_copy_bytes_per_s > rates.host_copy_bytes_per_s


def healthy() -> dict:
    """A machine of two GPUs with NVLink, on which nothing is slow."""
    gpu = {
        "name": "H100", "bytes": 80 * GIB, "free": 79 * GIB, "capability": [9, 0], "pcie_generation": 5,
        "pcie_max_generation": 5, "pcie_width": 16, "pcie_max_width": 16, "numa_node": 0, "nvlinks": ["switch"] * 4,
    }  # fmt: skip
    return {
        "versions": dict.fromkeys(("torch", "transformers", "safetensors", "triton", "CUDA of torch"), "13.0"),
        "gpu": {
            "driver": "580",
            "cuda": "13.1",
            "gpus": [{"index": 0, **gpu}, {"index": 1, **gpu}],
            "links": [{"between": [0, 1], "nvlinks": 4, "path": "one NUMA node"}],
        },
        "cpu": {
            "allowed_cores": list(range(64)), "logical_cores": 64, "physical_cores_allowed": 32, "quota_cores": None,
            "load": 0.1,
        },
        "memory": {"total": 512 * GIB, "available": 500 * GIB, "limit": None},
        "limits": {"locked_memory": None, "shm_bytes": 64 * GIB, "open_files": 1 << 20},
        "kernels": {"built": True, "path": "avx512", "error": None},
        "offload_calls": {"memfd_create": None},
        "disks": [{"what": "working folder", "path": "/w", "free": 500 * GIB, "total": 900 * GIB}],
        "environment": {},
        "is_wsl": False,
        "rates": {
            "device": "H100", "matmul_flop_per_s": {"fp32": 5e13, "bf16": 6e14, "fp16": 6e14},
            "h2d_bytes_per_s": 5e10, "d2h_bytes_per_s": 5e10,
        },
    }  # fmt: skip


FAULTS = [
    ("versions.CUDA of torch", None, "build for the CPU", True),
    ("versions.torch", None, "torch is not installed", True),
    ("versions.triton", None, "triton is missing", False),
    ("environment.CUDA_VISIBLE_DEVICES", "", "hides every GPU", True),
    ("environment.OMP_NUM_THREADS", "1", "OMP_NUM_THREADS is 1", False),
    ("cpu.allowed_cores", [0, 1], "2 of 64 cores", False),
    ("cpu.quota_cores", 2.5, "2.5 cores' worth of time", False),
    ("cpu.physical_cores_allowed", 4, "4 cores for 2 GPUs", False),
    ("cpu.load", 80.0, "others are at work", False),
    ("memory.limit", 8 * GIB, "8.0 GiB of 512.0 GiB", False),
    ("versions.CUDA of torch", "14.0", "built for CUDA 14.0, and the driver goes up to 13.1", True),
    ("limits.shm_bytes", 64 << 20, "/dev/shm has 64.0 MiB", False),
    ("limits.open_files", 1024, "1,024 files", False),
    ("kernels.built", False, "not built", False),
    ("kernels.path", "plain", "without AVX2", False),
    ("kernels.error", "built from other sources", "do not load", True),
    ("offload_calls.memfd_create", "Operation not permitted", "needs memfd_create", True),
    ("gpu.gpus.0.pcie_width", 4, "GPU 0 (H100) is on 4 of 16", False),
    ("gpu.gpus.1.capability", [7, 5], "GPU 1 (H100) has no bf16", False),
    ("gpu.gpus.0.free", 20 * GIB, "60.0 GiB are in use", False),
    ("gpu.links.0.nvlinks", 0, "1 of 1 pairs of GPUs have no NVLink", False),
    ("rates.matmul_flop_per_s.bf16", 1e13, "bf16 is 5.0 times slower", False),
    ("rates.d2h_bytes_per_s", 3e9, "3.0 GB/s", False),
    ("disks.0.free", GIB, "1.0 GiB free", False),
    ("is_wsl", True, "WSL2", False),
    ("rates_error", "CUDA error: no kernel image", "measuring failed", True),
]


def test_of_a_healthy_machine_nothing_is_said():
    assert advice(healthy()) == []


@pytest.mark.parametrize("place, value, part, is_broken", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_each_fault_is_one_line_with_a_remedy(place, value, part, is_broken):
    """And no other line: what is slow is told once; what does not work makes the exit status 1."""
    found = copy.deepcopy(healthy())
    *above, last = place.split(".")
    inner = found
    for name in above:
        inner = inner[int(name)] if isinstance(inner, list) else inner[name]
    inner[last] = value
    (one,) = advice(found)
    assert part in one.what and one.remedy and one.is_broken is is_broken
    assert len(one.what) < 130 and "\n" not in one.what + one.remedy


def test_locked_memory_is_told_where_copies_are_slow():
    """Most drivers pin whatever the limit is: a small one alone is no reason."""
    found = healthy()
    found["limits"]["locked_memory"] = 64 << 10
    assert advice(found) == []
    found["rates"]["h2d_bytes_per_s"] = 2e9
    assert ["2.0 GB/s" in one.what or "may lock 64.0 KiB" in one.what for one in advice(found)] == [True, True]


class NVMLError(Exception):
    pass


def fake_library(widths=(16, 16), links=None, fails: str = "") -> SimpleNamespace:
    """The management library of two GPUs. links: for each GPU the address at the other end of its links."""
    buses = ("00000000:3B:00.0", "00000000:AF:00.0")
    links = links or {0: [], 1: []}

    def get(value):
        def function(handle, *arguments):
            if function.name in fails.split():
                raise NVMLError("Not Supported")
            return value(handle, *arguments) if callable(value) else value

        return function

    def state(handle, link):
        if link >= len(links[handle]):
            raise NVMLError("Invalid Argument")
        return 1

    functions = {
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24 * GIB, free=23 * GIB),
        "nvmlDeviceGetName": b"RTX 4090",
        "nvmlDeviceGetPciInfo": lambda handle: SimpleNamespace(busId=buses[handle]),
        "nvmlDeviceGetCudaComputeCapability": (8, 9),
        "nvmlDeviceGetCurrPcieLinkGeneration": 1,
        "nvmlDeviceGetMaxPcieLinkGeneration": 4,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: widths[handle],
        "nvmlDeviceGetMaxPcieLinkWidth": 16,
        "nvmlDeviceGetNvLinkState": state,
        "nvmlDeviceGetNvLinkRemotePciInfo": lambda handle, link: SimpleNamespace(busId=links[handle][link]),
        "nvmlDeviceGetTopologyCommonAncestor": 50,
    }
    made = {}
    for name, value in functions.items():
        made[name] = get(value)
        made[name].name = name
    return SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlSystemGetCudaDriverVersion_v2=lambda: 13010, **made,
    )  # fmt: skip


def test_gpus_and_links_come_from_the_management_library(monkeypatch):
    """PCIe, NVLink directly and through a switch; what a card does not tell is left out, not an error."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_library())
    found = gpus.gpus()
    assert (
        found["driver"] == "580.1"
        and found["cuda"] == "13.1"
        and [gpu["name"] for gpu in found["gpus"]] == ["RTX 4090"] * 2
    )
    assert found["gpus"][0]["capability"] == [8, 9] and found["gpus"][0]["pci"] == "00000000:3B:00.0"
    assert found["links"] == [{"between": [0, 1], "nvlinks": 0, "path": "across NUMA nodes"}]
    direct = {0: ["00000000:AF:00.0"] * 2, 1: ["00000000:3B:00.0"] * 2}
    monkeypatch.setitem(sys.modules, "pynvml", fake_library(links=direct))
    assert gpus.gpus()["links"][0]["nvlinks"] == 2
    switched = {0: ["00000000:01:00.0"] * 6, 1: ["00000000:02:00.0"] * 6}
    monkeypatch.setitem(sys.modules, "pynvml", fake_library(links=switched))
    assert gpus.gpus()["links"][0]["nvlinks"] == 6
    quiet = "nvmlDeviceGetCurrPcieLinkWidth nvmlDeviceGetTopologyCommonAncestor"
    monkeypatch.setitem(sys.modules, "pynvml", fake_library(fails=quiet))
    assert gpus.gpus()["gpus"][0]["pcie_width"] is None and gpus.gpus()["links"][0]["path"] == "not told"


def test_a_machine_with_gpus_is_printed(monkeypatch, capsys):
    """The whole page of two cards of 24 GB on PCIe, one of them in a narrow slot."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_library(widths=(16, 4)))
    status = cli.main(["doctor", "--no_measure"])
    text = capsys.readouterr().out
    assert "GPU 1" in text and "PCIe 1.0 x4 (at most 4.0 x16), no NVLink" in text and "0 - 1" in text
    assert "GPU 1 (RTX 4090) is on 4 of 16 PCIe lanes" in text and "across NUMA nodes" in text
    assert status == (1 if torch.version.cuda is None else 0) and all(len(line) < 150 for line in text.splitlines())


def test_without_a_driver_it_says_so(monkeypatch, capsys):
    def no_driver():
        raise NVMLError("NVML Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=NVMLError, nvmlInit=no_driver))
    assert "driver does not answer" in gpus.gpus()["absent"]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in gpus.gpus()["absent"]


@pytest.mark.parametrize(
    "files, cores, limit",
    [
        (
            {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000", "sys/fs/cgroup/memory.max": "1024"},
            1.5,
            1024,
        ),
        (
            {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000", "sys/fs/cgroup/a/memory.max": "max"},
            None,
            None,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/k\n2:cpu,cpuacct:/k\n",
                "sys/fs/cgroup/cpu,cpuacct/k/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/k/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2048",
            },
            0.5,
            2048,
        ),
        (
            {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"},
            None,
            None,
        ),
        (
            {
                "proc/self/cgroup": "0::/slice/own",
                "sys/fs/cgroup/slice/own/memory.max": "max",
                "sys/fs/cgroup/slice/memory.max": "512",
                "sys/fs/cgroup/slice/own/cpu.max": "400000 100000",
                "sys/fs/cgroup/slice/cpu.max": "200000 100000",
            },
            2.0,
            512,
        ),
        ({}, None, None),
    ],
)
def test_limits_of_control_groups_of_both_versions(tmp_path, monkeypatch, files, cores, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "SYS", tmp_path / "sys")
    assert machine.processor()["quota_cores"] == cores and machine.memory()["limit"] == limit


def test_under_torchrun_the_all_reduce_is_measured_and_rank_0_prints():
    """Two ranks over gloo: one page of JSON, with the rate over the bus."""
    program = Program(ROOT / "zerolite" / "__main__.py", ["doctor", "--json"], 2, {})
    out, err = program.communicate()
    found = json.loads(out)
    assert program.returncode == 0, err
    assert found["rates"]["num_ranks"] == 2 and found["rates"]["all_reduce_bytes_per_s"] > 1e6


def test_cores_are_told_as_ranges():
    assert doctor._ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
