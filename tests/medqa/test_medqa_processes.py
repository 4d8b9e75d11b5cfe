"""train_medqa.py as a user starts it: exit status and last words after a signal, a failing rank, and a mistake."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import crosses
import programs
import psutil
import pytest
from kills import is_running
from limits import Limit, load, until
from paths import ROOT
from programs import Program
from transformers import LlamaConfig, LlamaForCausalLM

from zerolite.medqa import resume
from zerolite.medqa.arguments import CORPUS

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
SINGLE = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Options of a run that takes milliseconds a step."""
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    files = ["--model_name_or_path", str(folder), "--tokenizer_name_or_path", str(CORPUS / "tokenizer")]
    return [*files, "--cutoff_len", "64", "--max_samples", "16", "--logging_steps", "1"]


def start(arguments: list[str], ranks: int | None = 2, script: Path = ROOT / "train_medqa.py") -> Program:
    """By torchrun on so many ranks; None: by python."""
    return Program(script, arguments, ranks, ENVIRONMENT)


def stop_while_training(process: Program, number: signal.Signals) -> tuple[int, list[str], str]:
    """Signal the process at its third step: (status, lines of stdout, stderr)."""
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    out, err = process.communicate()
    return process.returncode, [*lines, *out.strip().splitlines()], err


@pytest.mark.parametrize("offload", [["--offload", "cpu"], *([[]] if crosses.FULL else [])])  # two torchruns each
def test_sigterm_to_all_ranks_leaves_a_checkpoint_to_go_on_from(flags, tmp_path, offload):
    """torchrun signals process groups: the optimizer's workers too."""
    output = tmp_path / "out put"
    flags = [*flags, *offload, "--output_dir", str(output), "--max_steps", "1000000", "--stage", "3"]
    process = start(flags)
    status, lines, err = stop_while_training(process, signal.SIGTERM)
    assert status != 0 and "Traceback" not in err.split("torch/distributed")[0]
    assert lines[-1].startswith("stopped by SIGTERM: ") and "is complete; go on with: torchrun" in lines[-1]
    (checkpoint,) = resume.checkpoints(output)
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert step >= 3 and f"{checkpoint} is complete" in lines[-1]
    assert lines[-1].endswith(f"train_medqa.py --resume '{output}'")
    done = start(["--resume", str(output), "--max_steps", str(step + 2)])
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert f"resumed from {checkpoint} at step {step}" in out and f"step {step + 2}/{step + 2}" in out


def test_ctrl_c_on_one_process(flags, tmp_path):
    process = start([*flags, "--output_dir", str(tmp_path), "--max_steps", "1000000"], ranks=None)
    status, lines, err = stop_while_training(process, signal.SIGINT)
    assert status == 130 and "Traceback" not in err
    assert lines[-1].startswith("stopped by SIGINT: ") and "go on with: python " in lines[-1]
    assert len(resume.checkpoints(tmp_path)) == 1


def test_a_failing_rank_ends_all_with_its_own_error_first(flags, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(
        "import os, sys\n"
        "import train_medqa\n"
        "def fail(*arguments):\n"
        "    if os.environ['RANK'] == '1': raise MemoryError('no room on this rank')\n"
        "    return whole(*arguments)\n"
        "whole, train_medqa.label_loss = train_medqa.label_loss, fail\n"
        "train_medqa.processes.leave(train_medqa.main())\n"
    )
    limit = Limit(programs.END_S)
    process = start([*flags, "--output_dir", str(tmp_path / "out")], script=script)
    _, err = process.communicate()
    assert process.returncode != 0 and not limit.is_over()
    assert "rank 1 failed: no room on this rank" in err and "rank 0 failed" not in err
    assert err.index("rank 1 failed") < err.find("rank 0: ends") or "rank 0: ends" not in err


def test_a_killed_worker_ends_the_run_by_name(flags, tmp_path):
    """Both ranks and all four workers end, and the one that was killed is named, once."""
    offload = ["--offload", "cpu", "--offload_workers", "2", "--stage", "3", "--max_steps", "1000000"]
    process = start([*flags, *offload, "--output_dir", str(tmp_path)])
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    ranks = psutil.Process(process.pid).children()
    workers = {worker for rank in ranks for worker in rank.children() if "cpu_worker.py" in " ".join(worker.cmdline())}
    victim = min(workers, key=lambda worker: worker.pid)
    victim.kill()
    _, err = process.communicate()
    assert process.returncode != 0 and len(workers) == 4
    assert re.search(rf"^rank \d: optimizer worker \d \(pid {victim.pid}\) was killed by SIGKILL", err, re.MULTILINE)
    assert not re.search(r"^rank \d failed", err, re.MULTILINE)  # with a traceback
    _, alive = psutil.wait_procs([*ranks, *workers], timeout=5 * load())
    assert all(left.status() == psutil.STATUS_ZOMBIE for left in alive)


def descendants_while_training(process: Program) -> list[psutil.Process]:
    """Ranks, in order of their start, then workers, once the third step is logged."""
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: rank.pid)
    return [*ranks, *(worker for rank in ranks for worker in rank.children())]


def test_ranks_and_workers_end_with_a_torchrun_that_is_killed_and_leave_a_checkpoint(flags, tmp_path):
    offload = ["--offload", "cpu", "--offload_workers", "1", "--stage", "2", "--max_steps", "1000000"]
    process = start([*flags, *offload, "--output_dir", str(tmp_path)])
    others = descendants_while_training(process)
    process.kill()
    _, alive = psutil.wait_procs(others, timeout=5 * load())
    out, err = process.communicate()
    assert len(others) >= 4 and all(left.status() == psutil.STATUS_ZOMBIE for left in alive)
    (checkpoint,) = resume.checkpoints(tmp_path)
    assert f"stopped by SIGTERM: {checkpoint} is complete" in out and "Traceback" not in err
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    folders = ["--output_dir", str(tmp_path), "--resume", str(tmp_path)]
    done = start([*flags, *offload[:-1], str(step + 1), *folders])
    out, err = done.communicate()
    assert done.returncode == 0 and f"resumed from {checkpoint} at step {step}" in out, err


def test_a_survivor_of_a_killed_rank_speaks_within_two_seconds(flags, tmp_path):
    """Without torchrun, which would end it and speak itself."""
    common = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    arguments = [*flags, "--output_dir", str(tmp_path), "--max_steps", "1000000"]
    ranks = [Program(ROOT / "train_medqa.py", arguments, None, {**common, "RANK": rank}) for rank in ("0", "1")]
    for line in ranks[0].stdout:
        if line.startswith("step 3/"):
            break
    ranks[1].kill()
    began = time.monotonic()
    _, err = ranks[0].communicate()
    assert time.monotonic() - began < 2.5 * load()
    assert ranks[0].returncode == 1 and "rank 0: ends because another rank did" in err
    ranks[1].communicate()


def test_a_survivor_of_a_rank_that_is_killed_before_training_tells_no_mistake_of_the_user(flags, tmp_path):
    """Rank 0 dies while the model is sharded; rank 1 is no user's mistake, which rank 0 would tell."""
    script = tmp_path / "dying.py"
    script.write_text(
        "import os, signal\n"
        "import train_medqa\n"
        "if os.environ['RANK'] == '0':\n"
        "    train_medqa.model.sharded = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)\n"
        "train_medqa.processes.leave(train_medqa.main())\n"
    )
    common = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    arguments = [*flags, "--output_dir", str(tmp_path / "out")]
    ranks = [Program(script, arguments, None, {**common, "RANK": rank}) for rank in ("0", "1")]
    ranks[0].communicate()
    began = time.monotonic()
    _, err = ranks[1].communicate()
    assert time.monotonic() - began < 2.5 * load()
    assert ranks[1].returncode == 1 and "rank 1: ends because another rank did" in err and "error:" not in err


def test_ranks_that_still_import_when_torchrun_is_killed_end_too(flags, tmp_path):
    """Their parent is another process then, and the store that they would join is gone."""
    script = tmp_path / "importing.py"
    script.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'rank-' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        f"while not pathlib.Path({str(tmp_path)!r}, 'killed').exists(): time.sleep(0.01)\n"
        "import train_medqa\n"
        "train_medqa.processes.leave(train_medqa.main())\n"
    )
    process = start([*flags, "--output_dir", str(tmp_path / "out")], script=script)
    assert until(lambda: all((tmp_path / f"rank-{rank}").exists() for rank in range(2)), programs.END_S)
    ranks = psutil.Process(process.pid).children()
    process.kill()
    process._process.wait()
    (tmp_path / "killed").touch()
    have_ended = until(lambda: not any(is_running(rank.pid) for rank in ranks), 5.0)
    for rank in ranks:
        if is_running(rank.pid):
            rank.kill()
    _, err = process.communicate()
    assert len(ranks) >= 2 and have_ended
    assert "failed" not in err  # as they would say that wait for the store, and wait, and give up


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("launcher", "arguments", "message"),
    [
        (SINGLE, ["--stage", "4"], "--stage: expected one of 0, 1, 2, 3, got '4'"),
        (TORCHRUN, ["--train_file", "absent.jsonl"], "absent.jsonl: cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_is_one_message(launcher, arguments, message, tmp_path):
    """Of the real programs, from the interpreter on."""
    command = [*launcher, str(ROOT / "train_medqa.py"), *arguments, "--output_dir", str(tmp_path)]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=programs.END_S * load())
    out, err = done.stdout, done.stderr
    assert err.count(f"train_medqa.py: error: {message}") == 1 and out == ""
    if launcher == SINGLE:
        assert done.returncode == 2 and err.count("\n") == 1
    else:
        assert done.returncode != 0


def test_a_mistake_that_one_rank_alone_finds_is_told_by_rank_0_at_once(flags, tmp_path):
    """A machine without the rows, say; nobody waits for a rank that has ended."""
    script = tmp_path / "lacking.py"
    script.write_text(
        "import os, sys\n"
        "import train_medqa\n"
        "if os.environ['RANK'] == '1': sys.argv += ['--train_file', 'absent.jsonl']\n"
        "train_medqa.processes.SAME_BEFORE_JOIN_S = 1000.0\n"
        "train_medqa.processes.leave(train_medqa.main())\n"
    )
    process = start([*flags, "--output_dir", str(tmp_path / "out")], script=script)
    _, err = process.communicate()
    assert process.returncode != 0
    told = "train_medqa.py: error: rank 1: absent.jsonl: cannot be read: No such file or directory"
    assert err.count(told) == 1 == err.count("train_medqa.py: error:"), err
