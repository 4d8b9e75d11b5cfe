"""What a machine with a GPU is asked: build, test, each benchmark beside its peers; in parts of ten minutes at most.

`make gpu` runs all parts that have no result yet, one after the other. A machine that is lent for minutes at a time
runs a few parts a call, and `--seconds` says how long a call may take: no part starts that may not end in time. Each
part leaves one file `<part>.json` in the output folder: its command, exit code, seconds, the end of what it printed,
the machine, and the reports that a benchmark wrote. A part with exit code 0 is not run again.

    python benchmarks/gpu.py                                              # all of it, into benchmarks/results/gpu
    python benchmarks/gpu.py --list                                       # parts, limits and commands; runs nothing
    python benchmarks/gpu.py build tests-kernels lora --output $OUT --seconds 580
    python benchmarks/gpu.py --show benchmarks/results/gpu                # reports to benchmarks/results, and gpu.md
    CUDA_VISIBLE_DEVICES= python benchmarks/gpu.py --tiny steps --output /tmp/tiny  # a small form, on the CPU too
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from harness import RESULTS

ROOT = Path(__file__).parents[1]
TAIL_CHARACTERS = 6000
LIMIT_SECONDS = 570  # of a part: ten minutes, less what a machine needs to answer
VERSIONS = ("torch", "triton", "transformers", "peft", "deepspeed", "torchao", "numpy")


@dataclass(frozen=True)
class Part:
    """One command of at most `limit` seconds. A benchmark is a script of this folder, which writes a report."""

    arguments: str
    tiny: str = ""  # arguments that replace them on a machine without a GPU
    benchmark: str = ""
    limit: int = LIMIT_SECONDS

    def command(self, output: Path, is_tiny: bool) -> list[str]:
        arguments = (self.tiny if is_tiny and self.tiny else self.arguments).replace("GPUS", str(num_ranks(is_tiny)))
        if not self.benchmark:
            return [sys.executable, "-m", *shlex.split(arguments)]
        before, mark, after = arguments.partition(" -- ")  # what follows is for train_medqa.py
        command = [sys.executable, str(ROOT / "benchmarks" / self.benchmark), *shlex.split(before)]
        return [*command, "--output", str(output), *(["--", *shlex.split(after)] if mark else [])]


def num_ranks(is_tiny: bool) -> int:
    return 2 if is_tiny else max(1, torch.cuda.device_count())


PARTS = {
    "build": Part("pip install --quiet --no-deps --no-build-isolation -e .", limit=120),
    "tests-kernels": Part("pytest -m gpu tests/kernels", "pytest tests/kernels/test_loss_kernels.py -k chunks"),
    "tests": Part("pytest -m gpu tests --ignore tests/kernels", "pytest tests/engine/test_devices.py -k freed"),
    "steps": Part(
        "--size m --precision bf16 --ranks GPUS --repeats 2",
        "--size tiny --ranks GPUS --steps 2 --repeats 1 --modes zerolite2",
        "steps/zero_step.py",
    ),
    "steps-fp32": Part("--size m --ranks GPUS --repeats 2", benchmark="steps/zero_step.py"),
    "lora": Part(
        "--models 7b --tokens 8192 --ranks 8 16 64 --dtype bf16 --rounds 5",
        "--models tiny --tokens 48 --ranks 8 --rounds 1 --sample-ms 1",
        "adapters/lora.py",
    ),
    "lora-long": Part(
        "--models 13b --tokens 1024 32768 --ranks 16 128 --dtype bf16 --rounds 3", "", "adapters/lora.py"
    ),
    "offload-1b": Part(
        "--model 1b --precision bf16 --ranks GPUS --repeats 1 --steps 4 --accumulation 1 --clip 1",
        "--model tiny --ranks GPUS --steps 2 --repeats 1 --modes zerolite_offload",
        "offload/offload.py",
    ),
    "offload-3b": Part(
        "--model 3b --precision bf16 --gpu-memory 24GiB --ranks GPUS --repeats 1 --steps 3 --accumulation 1 --clip 1 "
        "--modes zerolite_offload zerolite_int8 zerolite_parameters fsdp2_offload deepspeed2_offload",
        benchmark="offload/offload.py",
    ),
    "offload-states": Part(
        "--ranks GPUS -- --max_steps 60", "--ranks GPUS -- --max_steps 2 --max_samples 8", "offload/offload_states.py"
    ),
    "memory": Part(
        "--model 1b --ranks GPUS --sequence 1024 --steps 3 --timeout 120 --modes zerolite0 zerolite1 zerolite2 "
        "zerolite3 zerolite2-optimizer zerolite3-parameters zerolite0-lora zerolite3-parameters-lora fsdp2 "
        "fsdp2-offload",
        "--model tiny --ranks GPUS --steps 1 --scale --modes zerolite2",
        "memory/memory.py",
    ),
    "memory-peers": Part(
        "--model 1b --ranks GPUS --sequence 1024 --steps 3 --timeout 120 --scale --label _peers --modes deepspeed1 "
        "deepspeed2 deepspeed3 deepspeed2-offload deepspeed3-offload peft-lora torchao-8bit torchao-offload",
        benchmark="memory/memory.py",
    ),
    "memory-table": Part("--measure GPUS --timeout 100", benchmark="memory/hardware_table.py"),
    "host": Part(
        "--sizes 64 --rounds 3 --groups adam lion",
        "--sizes 1 --rounds 1 --groups adam --layouts 1x1 --sample 1",
        "host/cpu_optimizer.py",
    ),
}


def run(name: str, part: Part, is_tiny: bool) -> dict:
    """Run one part, ended with all of its processes at its limit; what its file says."""
    with tempfile.TemporaryDirectory(prefix="zerolite-gpu-") as folder:
        command = part.command(Path(folder), is_tiny)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        start = time.monotonic()
        with open(Path(folder) / "log", "w+") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(timeout=part.limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = 124
            log.seek(0)
            tail = log.read()[-TAIL_CHARACTERS:]
        reports = {
            path.name: path.read_text() for suffix in ("json", "md") for path in Path(folder).glob(f"*.{suffix}")
        }
    return {
        "part": name,
        "command": shlex.join(["python", *command[1:]]).replace(str(ROOT), ".").replace(folder, "folder"),
        "code": code,
        "seconds": round(time.monotonic() - start, 1),
        "is_tiny": is_tiny,
        "machine": harness.machine_facts(VERSIONS),
        "tail": tail,
        "reports": reports,
    }


def run_parts(names: list[str], output: Path, seconds: float, is_tiny: bool) -> list[str]:
    """Run what has no result yet and may end in time; the names of the parts that failed or were left out."""
    output.mkdir(parents=True, exist_ok=True)
    deadline, missing = time.monotonic() + seconds, []
    for name in names:
        part, file = PARTS[name], output / f"{name}.json"
        if is_done(file):
            print(f"{name}: done before", flush=True)
            continue
        if time.monotonic() + part.limit > deadline:
            print(f"{name}: left for another call, it may take {part.limit} s", flush=True)
            missing.append(name)
            continue
        result = run(name, part, is_tiny)
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: exit code {result['code']} after {result['seconds']} s", flush=True)
        if result["code"] != 0:
            print(result["tail"], flush=True)
            missing.append(name)
    return missing


def is_done(file: Path) -> bool:
    return file.is_file() and json.loads(file.read_text())["code"] == 0


def show(folder: Path, results: Path) -> str:
    """Put the reports of every part beside those of other machines; a table of the parts, which is `gpu.md` there."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    rows = []
    for result in found:
        for name, text in result["reports"].items():
            (results / name).write_text(text)
        reports = ", ".join(f"`{name}`" for name in sorted(result["reports"]) if name.endswith(".md"))
        how = "ok" if result["code"] == 0 else "out of time" if result["code"] == 124 else f"exit code {result['code']}"
        last = result["tail"].strip().splitlines()[-1:] if not result["reports"] else []
        rows.append([result["part"], how, result["seconds"], reports or " ".join(last), f"`{result['command']}`"])
    table = harness.markdown_table(["part", "result", "seconds", "reports, or the last line", "command"], rows)
    machine = harness.facts_markdown(found[0]["machine"]) if found else "no part has run"
    text = f"# Parts of `make gpu`\n\n{machine}\n\n{table}\n"
    (results / "gpu.md").write_text(text)
    return text


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or RESULTS / "gpu"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="that this call may take")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a machine without a GPU")
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--show", type=Path, metavar="FOLDER", help="write tables of what has run")
    arguments = parser.parse_args(words)
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if arguments.show is not None:
        print(show(arguments.show, RESULTS))
        return 0
    chosen = arguments.parts or [name for name, part in PARTS.items() if part.tiny or not arguments.tiny]
    if arguments.list:
        for name in chosen:
            print(f"{name} ({PARTS[name].limit} s): {shlex.join(PARTS[name].command(Path('folder'), arguments.tiny))}")
        return 0
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("no CUDA device is visible: --tiny runs a small form on the CPU, --list says what would run")
    missing = run_parts(chosen, arguments.output, arguments.seconds, arguments.tiny)
    print(f"not done: {', '.join(missing)}" if missing else "all done", flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
