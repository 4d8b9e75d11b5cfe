"""What the checkpoint tests save: a small model with every oddity, its training, and all of its state as bits."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from models import Stack, drawn, joint_batch, part
from torch import Tensor, nn


class Odd(Stack):
    """Tied, frozen, scalar and zero-size parameters; buffers that differ from rank to rank, one not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.blocks[1].requires_grad_(False)
        self.last.bias.requires_grad_(False)
        self.nothing = nn.Parameter(torch.empty(3, 0))
        self.blocks[0].nothing = nn.Parameter(torch.empty(0))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sum", torch.zeros(5, dtype=torch.float64))
        self.register_buffer("table", torch.ones(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.sum += x.detach().double().sum(0)
        return super().forward(x) * self.scalar


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def make(stage: int, dtype: torch.dtype = torch.float64, rule: str = "AdamW", seed: int = 0, cls=Odd, **options):
    """A sharded model and its optimizer, in two groups."""
    import zerolite

    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3) if dtype == torch.float16 else None
    reduce = torch.float64 if dtype == torch.float64 else torch.float32
    model = drawn(cls, seed)
    model = zerolite.shard(model, stage=stage, precision=zerolite.Precision(dtype, reduce, scaler), **options)
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": 0.03}, {"params": rest, "weight_decay": 0.1}]
    return model, getattr(zerolite, rule)(groups, lr=1e-2, max_grad_norm=1.0)


def train(model: nn.Module, optimizer, steps: range) -> None:
    """Steps on the joint batch: any world size does the same but for rounding."""
    for step in steps:
        batch = part(joint_batch("stack", step), rank(), world())
        ((model(batch["x"]).double() - batch["y"]).square().sum() * world() / 16).backward()
        optimizer.step()
        optimizer.zero_grad()


def full(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters, and this rank's persistent buffers."""
    import zerolite

    with zerolite.full_params(model):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def state(model: nn.Module, optimizer) -> dict[str, Tensor]:
    """All that this rank holds, as tensors to compare bit by bit."""
    engine = model._zerolite
    engine.fetch()
    found: dict[str, Tensor] = {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    for unit in engine.units:
        for index, bucket in enumerate(unit.buckets):
            key = f"{unit.name} {int(bucket.gradients is not None)} {index}"
            found[f"{key} owned"] = bucket.shard.owned.clone()
            found[f"{key} stepped"] = bucket.shard.values().clone()
            if bucket.parameters.stays_unsharded:
                found[f"{key} full"] = bucket.parameters.unsharded.clone()
            for name in optimizer.rule.state_names if bucket.gradients is not None else ():
                found[f"{key} {name}"] = optimizer.read_state(bucket, name).clone()
    description = optimizer.describe()
    for name, steps in description["steps"].items():
        found[f"step {name}"] = torch.tensor(steps)
    for index, group in enumerate(description["groups"]):
        numbers = [group["lr"], *group["betas"], group["weight_decay"], group.get("eps", 0.0)]
        found[f"group {index}"] = torch.tensor(numbers, dtype=torch.float64)
    if engine.loss_scale is not None:
        found["loss scale"] = torch.tensor([engine.loss_scale.value, engine.loss_scale.num_good_steps])
    return found


def attempt(work) -> tuple[str, str]:
    """(class, text) of what `work()` raised; ("", "") if it did not."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes; a folder ends in a slash."""
    return {
        f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}": b"" if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def save_steps(folder: Path, steps: int):
    import zerolite

    model, optimizer = make(3)
    train(model, optimizer, range(steps))
    zerolite.save(model, folder, optimizer, extra=steps)


def load_extra(folder: Path):
    import zerolite

    model, optimizer = make(3)
    return zerolite.load(model, folder, optimizer)
