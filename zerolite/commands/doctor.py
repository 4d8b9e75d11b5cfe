"""`zerolite doctor`: this machine as training sees it, its measured rates, what will be slow, why, and what to do."""

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from zerolite.commands import gpus, machine
from zerolite.commands.advice import Advice, advice
from zerolite.commands.command_line import BAD, OK, Parser, bytes_told, print_json, run, shown, table

QUICK_S, LONG_S = 0.03, 0.5  # of each rate
TOLD = """\
Rates are the best of repeated short measurements: of copies, of matrix products a dtype, of the host's optimizer step.
--measure takes half a second for each, --no_measure none (and answers without importing torch). Started by torchrun it
measures the ranks' all-reduce too, and rank 0 prints.

  zerolite doctor
  zerolite doctor --measure --json > rates.json
  torchrun --standalone --nproc-per-node 2 -m zerolite doctor --measure

exit status: 0 training works here (it may be slow: see the last lines), 1 something does not work, 2 a wrong option.
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run("doctor", doctor, argv)


def doctor(argv: Sequence[str]) -> int:
    """Under torchrun every rank must call it."""
    parser = Parser("doctor", "This machine: versions, GPUs, links, cores, limits, rates; what will be slow.", TOLD)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--measure", action="store_true", help="measure longer, for figures to plan with")
    how.add_argument("--no_measure", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true", help="everything, as JSON; `rates` is what zerolite plan reads")
    given = parser.parse_args(argv)
    found = gather()
    if not given.no_measure and found["versions"]["torch"] is not None:
        try:
            found |= _rates(LONG_S if given.measure else QUICK_S)
        except (RuntimeError, ImportError, ValueError) as error:  # of torch: no driver, another architecture, no memory
            found["rates_error"] = " ".join(str(error).split())[:200]
    advices = advice(found)
    found["advice"] = [one._asdict() for one in advices]
    if os.environ.get("RANK", "0") == "0":
        print_json(found) if given.json else print(_as_text(found, advices))
    return BAD if any(one.is_broken for one in advices) else OK


def gather() -> dict[str, Any]:
    """Everything but the rates."""
    return {
        "versions": machine.versions(),
        "gpu": gpus.gpus(),
        "cpu": machine.processor(),
        "memory": machine.memory(),
        "limits": machine.limits(),
        "kernels": machine.kernels(),
        "offload_calls": machine.offload_calls(),
        "disks": machine.disks(),
        "environment": machine.environment(),
        "is_wsl": machine.is_wsl(),
        "rates": None,
    }


def _rates(seconds: float) -> dict[str, Any]:
    """{"rates", "rates_took_s"}. Collective under torchrun."""
    from zerolite.memory.measured_rates import measure_rates

    start = time.perf_counter()
    return {"rates": measure_rates(seconds).as_json(), "rates_took_s": round(time.perf_counter() - start, 3)}


# Printing #


def _as_text(found: dict[str, Any], advices: list[Advice]) -> str:
    parts = [
        ("Versions", [(name, version or "not there") for name, version in found["versions"].items()]),
        ("GPUs", _gpu_rows(found["gpu"])),
        ("Host", _host_rows(found)),
        ("Measured", _rate_rows(found["rates"], found.get("rates_took_s", 0.0))),
    ]
    text = [
        f"{title}\n{table([(f'  {name}', shown(value, 110)) for name, value in rows])}" for title, rows in parts if rows
    ]
    lines = []
    for one in advices:
        lines.append(f"  {'does not work' if one.is_broken else 'slow'}: {one.what}\n    do: {one.remedy}")
    text.append("What will be slow, and what to do\n" + ("\n".join(lines) or "  nothing that shows from here"))
    return "\n\n".join(text)


def _gpu_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    if "absent" in found:
        return [("none", found["absent"])]
    rows = [("driver", f"{found['driver']}, for CUDA up to {found['cuda'] or '?'}")]
    for gpu in found["gpus"]:
        capability = ".".join(map(str, gpu["capability"]))
        now, most = (f"{gpu[f'pcie{of}generation']}.0 x{gpu[f'pcie{of}width']}" for of in ("_", "_max_"))
        pcie = f"PCIe {now} (at most {most})"
        node = "" if gpu["numa_node"] in (None, -1) else f", NUMA node {gpu['numa_node']}"
        links = f", {len(gpu['nvlinks'])} NVLinks" if gpu["nvlinks"] else ", no NVLink"
        memory = f"{bytes_told(gpu['free'])} of {bytes_told(gpu['bytes'])} free"
        rows.append((f"GPU {gpu['index']}", f"{gpu['name']}, {memory}, capability {capability}, {pcie}{links}{node}"))
    for link in found["links"]:
        first, second = link["between"]
        how = f"{link['nvlinks']} NVLinks" if link["nvlinks"] else link["path"]
        rows.append((f"{first} - {second}", how))
    return rows


def _host_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, memory, limits, kernels = (found[name] for name in ("cpu", "memory", "limits", "kernels"))
    quota = "" if cpu["quota_cores"] is None else f", time of {cpu['quota_cores']:.1f} (control group)"
    allowed = f"{len(cpu['allowed_cores'])} of {cpu['logical_cores']} may be used ({_ranges(cpu['allowed_cores'])})"
    cores = f"{allowed}, {cpu['physical_cores_allowed']} physical{quota}"
    limit = "" if memory["limit"] is None else f", control group: {bytes_told(memory['limit'])}"
    nodes = ", ".join(f"{n['node']}: cores {n['cores']}, {bytes_told(n['bytes'] or 0)}" for n in cpu["numa_nodes"])
    rows = [
        ("processor", f"{cpu['name']} ({', '.join(cpu['instructions']) or 'no AVX2'})"),
        ("cores", cores),
        ("NUMA nodes", f"{len(cpu['numa_nodes'])}: {nodes}" if nodes else "not told"),
        ("memory", f"{bytes_told(memory['available'])} of {bytes_told(memory['total'])} available{limit}"),
        ("locked memory", _limit(limits["locked_memory"])),
        ("/dev/shm", _limit(limits.get("shm_bytes"))),
        ("open files", "no limit" if limits["open_files"] is None else f"{limits['open_files']:,}"),
        ("C++ kernels", f"built, run on {kernels['path']}" if kernels["built"] else kernels["error"] or "not built"),
    ]
    rows += [(disk["what"], f"{bytes_told(disk['free'])} free in {disk['path']}") for disk in found["disks"]]
    rows += [(name, json.dumps(value)) for name, value in found["environment"].items()]
    return rows


def _limit(size: int | None) -> str:
    return "no limit" if size is None else bytes_told(size)


def _ranges(cores: Sequence[int]) -> str:
    """As "0-3,8"."""
    told: list[list[int]] = []
    for core in cores:
        if told and core == told[-1][1] + 1:
            told[-1][1] = core
        else:
            told.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in told)


def _rate_rows(rates: dict[str, Any] | None, took_s: float) -> list[tuple[str, str]]:
    if rates is None:
        return []
    where = rates["device"]
    rows = [
        (f"matrix products, {name}", f"{rate / 1e12:.3g} TFLOP/s on {where}")
        for name, rate in rates["matmul_flop_per_s"].items()
    ]
    for name, key in (
        (f"copy on {where}", "device_copy_bytes_per_s" if rates["h2d_bytes_per_s"] else ""),
        ("copy in host memory", "host_copy_bytes_per_s"),
        ("host to device", "h2d_bytes_per_s"),
        ("device to host", "d2h_bytes_per_s"),
        (f"all-reduce of {rates['num_ranks']} ranks", "all_reduce_bytes_per_s"),
    ):
        if rates.get(key):
            rows.append((name, f"{rates[key] / 1e9:.3g} GB/s"))
    if rates["host_step_elements_per_s"]:
        rate = rates["host_step_elements_per_s"]
        rows.append(("host step of AdamW", f"{rate / 1e9:.3g} G parameters/s in fp32, all cores"))
    rows.append(("", f"in {took_s} s; --measure takes longer, for figures to plan with"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
