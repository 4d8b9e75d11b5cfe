"""Does train_medqa.py on two hosts lose one of them, and go on to the bits of an undisturbed run, on two or on one?

Two network namespaces with a wire between them, a torchrun in each.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from hosts import ADDRESSES, INTERFACE, Hosts, Refused
from kills import is_running
from limits import until
from medqa_runs import tiny_llama, to_flags
from paths import ROOT
from programs import END_S, Program
from zerolite_kernels import cpu

from zerolite.medqa import resume
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.progress import METRICS, read_metrics

NUM_STEPS, SAVE_STEPS, LAST_STEP = 8, 2, 3  # a host is lost after the last one
WAITS = ("waits-0", "waits-1", "lost")
SCRIPT = f"""\
import os, pathlib, time
import train_medqa
from zerolite.medqa import divergence
add, here = divergence.Divergence.add, pathlib.Path(__file__).parent
def add_and_wait(self, step, optimizer):
    add(self, step, optimizer)
    if step == {LAST_STEP} and "LOSES" in os.environ:
        (here / f"waits-{{os.environ['RANK']}}").touch()
        limit = time.monotonic() + 100
        while not (here / "lost").exists() and time.monotonic() < limit:
            time.sleep(0.01)
divergence.Divergence.add = add_and_wait
train_medqa.processes.leave(train_medqa.main())
"""

pytestmark = pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")


@pytest.fixture(scope="module")
def hosts():
    try:
        with Hosts() as found:
            yield found
    except Refused as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """train_medqa.py, whose ranks say after a step that they wait, and wait for the file `lost` to be there."""
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama().save_pretrained(folder / "model")
    rows = [json.dumps({"instruction": f"What is cough {i}?", "output": "Air. " * (i % 3 + 1)}) for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    names = {"model_name_or_path": folder / "model", "tokenizer_name_or_path": CORPUS / "tokenizer"}
    sizes = {"cutoff_len": 32, "per_device_train_batch_size": 1, "learning_rate": 1e-3, "eval_steps": 0}
    steps = {"max_steps": NUM_STEPS, "save_steps": SAVE_STEPS, "logging_steps": 1, "train_file": folder / "rows.jsonl"}
    return {**names, **sizes, **steps, "stage": 3, "offload": "cpu", "offload_workers": 1}


def start(script: Path, arguments: list[str], ranks, network: int | None = None, loses: bool = False) -> Program:
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"GLOO_SOCKET_IFNAME": INTERFACE} if network else {}
    return Program(script, arguments, ranks, environment | ({"LOSES": "1"} if loses else {}), network=network)


def node(number: int, port: int) -> list[str]:
    """Options of torchrun on a host, with one rank."""
    where = ["--node-rank", str(number), "--master-addr", ADDRESSES[0], "--master-port", str(port)]
    return ["--nnodes", "2", "--nproc-per-node", "1", *where]


def result(folder: Path) -> dict[str, object]:
    """Bits of the exported weights, and the numbers of every step."""
    (weights,) = folder.glob("model/*.safetensors")
    records = [record for record in read_metrics(folder / METRICS) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    numbers = [tuple(record[name] for name in ("loss", "grad_norm", "learning_rate")) for record in records]
    return {"weights": hashlib.sha256(weights.read_bytes()).hexdigest(), "numbers": numbers}


@pytest.fixture(scope="module")
def expected(script, inputs, tmp_path_factory) -> dict[str, object]:
    """Of a run on one host that nobody disturbs."""
    output = tmp_path_factory.mktemp("whole") / "out"
    program = start(script, to_flags({**inputs, "output_dir": output}), 2)
    _, err = program.communicate()
    assert program.returncode == 0, err
    return result(output)


def start_both(
    hosts, script: Path, arguments: list[str], options: list[list[str]], loses: bool = False
) -> tuple[Program, Program]:
    """A torchrun with its options on each host; where one is to be lost, returns when both ranks wait for that."""
    for name in WAITS if loses else ():
        script.with_name(name).unlink(missing_ok=True)
    first, second = (start(script, arguments, own, host, loses) for own, host in zip(options, hosts, strict=True))
    assert not loses or until(lambda: all(script.with_name(name).exists() for name in WAITS[:2]), END_S)
    return first, second


def finish(programs: tuple[Program, ...]) -> None:
    for program in programs:
        _, err = program.communicate()
        assert program.returncode == 0, err


def lose_a_host(hosts, script: Path, inputs: dict, output: Path, port: int, victims: str) -> str:
    """Kill the agent of the second host, or its rank too; what the first one has printed at its end."""
    flags = to_flags({**inputs, "output_dir": output})
    first, second = start_both(hosts, script, flags, [node(0, port), node(1, port)], loses=True)
    (rank,) = children(second.pid)
    if victims == "agent and rank":
        os.kill(rank, signal.SIGKILL)
    second.kill()
    second._process.wait()
    script.with_name(WAITS[2]).touch()
    out, err = first.communicate()
    assert first.returncode not in (0, None), err
    assert until(lambda: not is_running(rank), END_S)
    second.communicate()
    return out


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_host_whose_agent_is_killed_leaves_a_checkpoint_and_the_command_to_go_on(
    hosts, script, inputs, expected, tmp_path
):
    """The rank of that host outlives its agent by a step, so the checkpoint is of that very step."""
    output = tmp_path / "out"
    out = lose_a_host(hosts, script, inputs, output, 29501, "agent")
    newest = resume.checkpoints(output)[-1]
    assert f"stopped by SIGTERM: {newest} is complete; go on with: " in out
    assert newest.name == f"checkpoint-{LAST_STEP}"
    copied = shutil.copytree(output, tmp_path / "copied")

    command, _, comment = out.strip().splitlines()[-1].partition("go on with: ")[2].partition("  # ")
    torchrun, *words = shlex.split(command)
    options, arguments = words[: words.index(str(script))], words[words.index(str(script)) + 1 :]
    assert (torchrun, comment) == ("torchrun", "on the other machine: --node-rank 1") and "--node-rank" in options
    others = [*options, *comment.split()[-2:]]  # torchrun takes the last of two
    finish(start_both(hosts, script, arguments, [options, others]))
    assert result(output) == expected

    one = start(script, ["--resume", str(copied), "--output_dir", str(copied)], 2)
    out, err = one.communicate()
    assert one.returncode == 0, err
    assert f"resumed from {copied / newest.name}" in out and result(copied) == expected


@pytest.mark.slow  # as the test above, with the death of a machine: the last checkpoint is one of save_steps
def test_a_host_that_is_lost_whole_costs_the_steps_since_the_last_checkpoint(hosts, script, inputs, expected, tmp_path):
    """Then a rank is killed, and the torchruns of both hosts start theirs again, each by its own count."""
    output = tmp_path / "out"
    lose_a_host(hosts, script, inputs, output, 29502, "agent and rank")
    assert [path.name for path in resume.checkpoints(output)] == [f"checkpoint-{SAVE_STEPS}"]

    options = [["--max-restarts", "2", *node(number, 29503)] for number in range(2)]
    first, second = start_both(hosts, script, ["--resume", str(output)], options, loses=True)
    (rank,) = children(second.pid)
    os.kill(rank, signal.SIGKILL)
    script.with_name(WAITS[2]).touch()
    finish((first, second))
    assert result(output) == expected
