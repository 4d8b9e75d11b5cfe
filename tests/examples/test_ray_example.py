"""Does the example for Ray Train train as plain torch, and go on from the last checkpoint where a worker is killed?"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from limits import load
from models import assert_close, assert_same_bits
from paths import ROOT
from safetensors.torch import load_file

from zerolite.examples.tiny import batches, loss_of, model

STEPS, DIES_AT = 5, 3  # a worker is killed after that step's report


class Died(Exception):
    pass


class ImitatedRay:
    """What the example asks of Ray Train, of one worker group that dies after a report, or does not."""

    def __init__(self, storage: str, last: str | None, dies_at: int | None):
        self.reported, self.last, self.dies_at = [], last, dies_at
        self.context = SimpleNamespace(
            get_world_rank=dist.get_rank,
            get_world_size=dist.get_world_size,
            get_storage=lambda: SimpleNamespace(experiment_fs_path=storage),
        )

    def get_checkpoint(self):
        return self.last and SimpleNamespace(path=self.last)

    def report(self, metrics, checkpoint, checkpoint_upload_mode) -> None:
        assert checkpoint_upload_mode == "NO_UPLOAD"
        self.last = str(checkpoint.path)
        self.reported.append(metrics)
        if metrics["step"] == self.dies_at:
            raise Died

    def modules(self) -> dict[str, ModuleType]:
        ray, train, of_torch = (ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch"))
        ray.train, train.torch = train, of_torch
        train.get_context, train.get_checkpoint, train.report = lambda: self.context, self.get_checkpoint, self.report
        train.Checkpoint = SimpleNamespace(from_directory=lambda folder: SimpleNamespace(path=folder))
        train.CheckpointUploadMode = SimpleNamespace(NO_UPLOAD="NO_UPLOAD")
        train.FailureConfig = train.RunConfig = train.ScalingConfig = of_torch.TorchTrainer = None
        return {"ray": ray, "ray.train": train, "ray.train.torch": of_torch}


def worker_groups(storage: str, config: dict, dies: bool, dtype: torch.dtype = torch.float32) -> list[dict]:
    """On a rank: worker groups, one after the other, until one has not died; what was reported."""
    reported, last = [], None
    for dies_at in [DIES_AT, None][not dies :]:
        ray = ImitatedRay(storage, last, dies_at)
        with mock.patch.dict(sys.modules, ray.modules()):
            sys.modules.pop("zerolite.examples.ray_train", None)
            example = importlib.import_module("zerolite.examples.ray_train")
            with mock.patch.object(example, "model", lambda: model().to(dtype)):
                try:
                    example.train_on_worker(config)
                except Died:
                    pass
        reported += ray.reported
        last = ray.last
    return reported


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Every rank's slices of a checkpoint."""
    files = sorted(folder.glob("rank-*.safetensors"))
    return {f"{file.stem} {name}": value for file in files for name, value in load_file(file).items()}


def test_workers_that_die_go_on_to_what_plain_torch_computes(ranks, tmp_path):
    """Under an imitation of Ray, in fp64."""
    config = {"stage": 3, "offload": None, "steps": STEPS}
    for reported in ranks(2).run(worker_groups, str(tmp_path), config, True, torch.float64):
        assert [metrics["step"] for metrics in reported] == list(range(1, STEPS + 1))
    net = model().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for tokens, targets in batches(STEPS):
        loss_of(net(tokens), targets).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = saved(tmp_path / f"step-{STEPS}")
    whole = {
        name: torch.cat([found.get(f"rank-0000{rank} parameter/{name}", torch.empty(0)) for rank in range(2)])
        for name, _ in net.named_parameters()
    }
    assert_close(whole, {name: value.detach().flatten() for name, value in net.named_parameters()})


DRIVER = """\
import json, os, pathlib, signal, sys
import ray, ray.train
from zerolite.examples import ray_train

storage, config = sys.argv[1], json.loads(sys.argv[2])

def dying(config):
    report, killed = ray.train.report, pathlib.Path(storage, "killed")
    def report_and_die(metrics, **options):
        report(metrics, **options)
        if metrics["step"] == %d and os.environ["RANK"] == "1" and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    ray.train.report = report_and_die
    ray_train.train_on_worker(config)

path = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}}
ray.init(num_cpus=3, include_dashboard=False, object_store_memory=80 << 20, _temp_dir=sys.argv[3], runtime_env=path)
trainer = ray_train.TorchTrainer(
    dying,
    train_loop_config=config,
    scaling_config=ray_train.ScalingConfig(num_workers=2),
    run_config=ray_train.RunConfig(
        name="run", storage_path=storage, failure_config=ray_train.FailureConfig(max_failures=1)
    ),
)
result = trainer.fit()
print("RESULT", json.dumps([result.metrics["step"], result.checkpoint.path]))
ray.shutdown()
"""


@pytest.mark.slow  # Ray's own processes, each of which imports torch
@pytest.mark.timeout(900)
def test_a_worker_of_ray_that_is_killed_is_started_again_and_goes_on(ranks, tmp_path_factory):
    """With offload; the last checkpoint has the bits of a run that nobody disturbed."""
    pytest.importorskip("ray")
    storage, whole = tmp_path_factory.mktemp("storage"), tmp_path_factory.mktemp("whole")
    sockets = tmp_path_factory.mktemp("r", numbered=True)
    config = {"stage": 3, "offload": "cpu", "steps": STEPS}
    driver = storage / "driver.py"
    driver.write_text(DRIVER % DIES_AT)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    }
    command = [sys.executable, str(driver), str(storage), json.dumps(config), str(sockets)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280 * load())
    assert done.returncode == 0 and (storage / "killed").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    last = storage / "run" / f"step-{STEPS}"
    assert f"RESULT {json.dumps([STEPS, str(last)])}" in done.stdout
    ranks(2).run(worker_groups, str(whole), config, False)
    assert_same_bits(saved(last), saved(whole / f"step-{STEPS}"))
