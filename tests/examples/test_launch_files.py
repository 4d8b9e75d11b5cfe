"""Do the launch files give torchrun on every machine what it needs, under the variables that each engine sets?"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import yaml
from paths import ROOT
from torch.distributed.run import config_from_args, get_args_parser

LAUNCH = ROOT / "zerolite" / "examples" / "launch"
# Stands for torchrun: writes its variables and arguments down, a file a machine.
TORCHRUN = """#!/bin/bash
python3 - "$@" <<'END'
import json, os, sys
chosen = {name: value for name, value in os.environ.items() if name.startswith("PET_")}
json.dump([chosen, sys.argv[1:]], open(os.environ["TOLD"] + os.environ["PET_NODE_RANK"], "w"))
END
"""
# Stands for srun: the command once for each node, as --ntasks-per-node=1 has it.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node SLURM_PROCID=$node "$@"; done
"""
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames gpu[07-09]" ]] && printf 'gpu07\\ngpu08\\ngpu09\\n'
"""


@pytest.fixture
def programs(tmp_path) -> dict[str, str]:
    """An environment whose srun, scontrol and torchrun are these."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("torchrun", TORCHRUN), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "TOLD": str(tmp_path / "told-")}


def run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def understood(told: Path) -> tuple:
    """(machines, number of this one, ranks, address, program) as torchrun reads what it was given."""
    variables, arguments = json.loads(told.read_text())
    with mock.patch.dict(os.environ, variables):
        options = get_args_parser().parse_args(arguments)
        config, _, program = config_from_args(options)
    assert config.min_nodes == config.max_nodes and config.rdzv_backend == "static"
    assert getattr(options, "shutdown_timeout", 280) == 280  # of 300 s; torch 2.13 has it
    return config.max_nodes, config.rdzv_configs["rank"], config.nproc_per_node, config.rdzv_endpoint, program[1:]


def test_slurm_starts_a_torchrun_on_each_node(programs, tmp_path):
    variables = {"SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_ON_NODE": "4"}
    script = ["bash", str(LAUNCH / "slurm.sh"), "train_medqa.py", "--output_dir", "a b"]
    run(script, {**programs, **variables, "SLURM_JOB_ID": "123456"})
    for node in range(3):
        found = understood(tmp_path / f"told-{node}")
        assert found[:4] == (3, node, 4, "gpu07:23456") and found[4][-3:] == ["train_medqa.py", "--output_dir", "a b"]


def test_slurms_options_are_of_one_task_a_node():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines if "=" in line and "#SBATCH" in line)
    assert options["ntasks-per-node"] == "1" and options["nodes"] == "2"


def kubernetes(text: str) -> tuple[str, list[dict], dict[str, str], str]:
    """(shell command, variables of each pod by Kubernetes, those of the file, address) of the Job."""
    service, job = yaml.safe_load_all(text)
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert container["command"] == ["bash", "-c"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    pods = [{"JOB_COMPLETION_INDEX": str(index)} for index in range(2)]
    return container["args"][0], pods, given, f"{job['metadata']['name']}-0.{pod['subdomain']}:29500"


def skypilot(text: str) -> tuple[str, list[dict], dict[str, str], str]:
    task = yaml.safe_load(text)
    nodes = {"SKYPILOT_NODE_IPS": "10.1.2.3\n10.1.2.4", "SKYPILOT_NUM_NODES": str(task["num_nodes"])}
    nodes["SKYPILOT_NUM_GPUS_PER_NODE"] = task["resources"]["accelerators"].partition(":")[2]
    return (
        task["run"],
        [{**nodes, "SKYPILOT_NODE_RANK": str(rank)} for rank in range(2)],
        task["envs"],
        "10.1.2.3:29500",
    )


@pytest.mark.parametrize(("file", "read"), [("kubernetes.yaml", kubernetes), ("skypilot.yaml", skypilot)])
def test_a_clouds_engine_starts_or_resumes_a_torchrun_on_each_machine(programs, tmp_path, file, read):
    text = (LAUNCH / file).read_text().replace("/shared", str(tmp_path / "shared"))
    command, machines, given, address = read(text)
    folder = tmp_path / "shared" / "medqa"
    for expected in (["--stage", "3", "--output_dir", str(folder)], ["--resume", str(folder)]):
        for rank, variables in enumerate(machines):
            run(["bash", "-c", command], {**programs, **given, **variables})
            found = understood(tmp_path / f"told-{rank}")
            assert found[:4] == (2, rank, 8, address) and found[4][-len(expected) :] == expected
        (folder / "checkpoint-4").mkdir(parents=True, exist_ok=True)
