"""Is what train_medqa.py says and checks right where its ranks are on several machines?"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.run import config_from_args, get_args_parser

from zerolite.medqa import claim, processes
from zerolite.medqa.processes import Processes


def torchruns(world_size: int, local_size: int, machines: int) -> dict[str, str]:
    address = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
    sizes = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": local_size, "GROUP_WORLD_SIZE": machines}
    return {**address, **{name: str(size) for name, size in sizes.items()}}


FOUR = "torchrun --nnodes 2 --nproc-per-node 2 --node-rank 0 --master-addr 10.0.0.1 --master-port 29400"
COMMANDS = [  # variables of the run, ranks wanted, command, its comment
    ({}, None, "python", ""),
    ({}, 2, "torchrun --standalone --nproc-per-node 2", ""),
    (torchruns(1, 1, 1), None, "torchrun --standalone --nproc-per-node 1", ""),
    (torchruns(2, 2, 1), None, "torchrun --standalone --nproc-per-node 2", ""),
    (torchruns(4, 2, 2), None, FOUR, "on the other machine: --node-rank 1"),
    (torchruns(4, 2, 2), 2, FOUR.replace("node 2", "node 1"), "on the other machine: --node-rank 1"),
    (torchruns(4, 2, 2), 3, "torchrun --standalone --nproc-per-node 3", ""),  # it was a run of one machine
    (torchruns(6, 2, 3), None, FOUR.replace("nnodes 2", "nnodes 3"), "on the other machines: --node-rank 1 to 2"),
    (torchruns(3, 2, 2), None, FOUR, "on the other machine: --node-rank 1, and --nproc-per-node as it was there"),
    ({"WORLD_SIZE": "4"}, None, "python", "on 4 ranks, launched as these were"),  # srun python, or by hand
    ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, None, "python", "on 4 ranks, launched as these were"),  # Ray
]


@pytest.mark.parametrize(("variables", "num_ranks", "launcher", "comment"), COMMANDS)
def test_a_run_is_told_the_command_of_its_machines(monkeypatch, variables, num_ranks, launcher, comment):
    for name in torchruns(1, 1, 1):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = processes.launched("train medqa.py", "--resume", "out", num_ranks=num_ranks)
    command, _, said = text.partition("  # ")
    assert (command, said) == (f"{launcher} 'train medqa.py' --resume out", comment)
    words = shlex.split(command)
    if words[0] == "torchrun":  # which understands it
        config, _, arguments = config_from_args(get_args_parser().parse_args(words[1:]))
        num_machines = 1 if "--standalone" in words else int(variables["GROUP_WORLD_SIZE"])
        assert (config.min_nodes, config.max_nodes) == (num_machines, num_machines)
        assert arguments[-3:] == ["train medqa.py", "--resume", "out"]


def folders_on_rank(folders: list[Path]) -> tuple[str, list[str]]:
    """What is found wrong where each rank has its folder, and what is left in it."""
    rank = dist.get_rank()
    claim.SEEN_S = 0.3
    try:
        claim.check_shared(folders[rank], Processes(rank, dist.get_world_size(), torch.device("cpu")))
        text = ""
    except ValueError as error:
        text = str(error)
    finally:
        claim.SEEN_S = 10.0
    dist.barrier()
    return text, [path.name for path in folders[rank].iterdir()] if folders[rank].exists() else []


def test_a_folder_that_the_machines_do_not_share_is_found_before_training(ranks, tmp_path):
    shared, other, absent = tmp_path / "shared", tmp_path / "other", tmp_path / "absent"
    shared.mkdir()
    other.mkdir()
    assert ranks(3).run(folders_on_rank, [shared, shared, shared]) == [("", [])] * 3
    for third in (other, absent):
        for number, (text, left) in enumerate(ranks(3).run(folders_on_rank, [shared, shared, third])):
            assert f"rank 2 ({third} on " in text and "expected one folder that all machines share" in text
            assert "rank 1" not in text and left == [], number
