"""A loop under Ray Train's TorchTrainer: workers that fail are started again, and go on from the last checkpoint.

    python -m zerolite.examples.ray_train --storage /shared/results --workers 2

Ray starts the process group and says which GPU is a worker's, so `train_on_worker` is a plain loop with three changed
lines. The checkpoint's lines are Ray's own, but that zerolite writes into the run's storage itself, each rank its
shard: Ray uploads nothing. A line that ends in `# zerolite` is new; `# was:` is what stood there.
"""

import argparse
from pathlib import Path

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

import zerolite  # zerolite
from zerolite.examples.tiny import batches, loss_of, model


def train_on_worker(config: dict) -> None:
    """config: stage, offload, steps."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    net = model()
    # was: net = ray.train.torch.prepare_model(net)
    net = zerolite.shard(net, stage=config["stage"], offload=config["offload"])  # zerolite
    # was: optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    optimizer = zerolite.AdamW(net.parameters(), lr=1e-2)  # zerolite
    device = next(net.parameters()).device
    first, checkpoint = 0, ray.train.get_checkpoint()
    if checkpoint is not None:
        # was: torch.load of what rank 0 has saved, and load_state_dict, twice
        first = zerolite.load(net, checkpoint.path, optimizer)["step"]  # zerolite
    storage = Path(context.get_storage().experiment_fs_path)  # every machine sees it, as Ray asks
    for step, (tokens, targets) in enumerate(batches(config["steps"], rank, world)):
        if step < first:
            continue
        loss = loss_of(net(tokens.to(device)), targets.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # was: torch.save of both state dicts on rank 0, into a temporary folder that Ray uploads
        folder = storage / f"step-{step + 1}"
        zerolite.save(net, folder, optimizer, extra={"step": step + 1})  # zerolite
        ray.train.report(
            {"step": step + 1, "loss": loss.item()},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--storage", required=True, help="a folder that all machines share")
    parser.add_argument("--name", default="zerolite", help="of the run; with the same one it goes on")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", action="store_true", help="one for each worker")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--offload", help='"cpu"')
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"stage": given.stage, "offload": given.offload, "steps": given.steps},
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpus),
        run_config=RunConfig(name=given.name, storage_path=given.storage, failure_config=FailureConfig(max_failures=3)),
    )
    result = trainer.fit()
    print(f"{result.metrics}, checkpoint {result.checkpoint.path}")


if __name__ == "__main__":
    main()
