"""Tiny models of diffusers' families, their joint batches, and a training that zerolite and plain torch carry out.

Some parts of diffusers compute in fp32 whatever the dtype, as some of transformers do: models.py says what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import diffusers
import torch
import torch.distributed as dist
from lora_models import SUFFIXES
from models import LOSS_SCALE, Batch, divide_gradients, drawn, part, whole
from torch import Tensor, nn

import zerolite
from zerolite import adapters

diffusers.FluxTransformer2DModel, diffusers.UNet2DConditionModel  # noqa: B018  # load lazily
diffusers.PixArtTransformer2DModel, diffusers.SD3Transformer2DModel, diffusers.DiTTransformer2DModel  # noqa: B018

ROWS, HEADS, WIDTH = 4, 2, 16  # 4 rows: 1 and 2 ranks cut them evenly
TEXT, POOLED = (5, 12), 10  # words and channels of a caption; channels of a whole one
LORA = {"r": 2, "alpha": 4, "dropout": 0.0}
SIZES = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "num_layers": 2}
LATENT = {"in_channels": 4, "sample_size": 8, "patch_size": 2}


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        **SIZES, **LATENT, out_channels=8, cross_attention_dim=WIDTH, caption_channels=TEXT[1]
    )


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        **SIZES,
        **LATENT,
        out_channels=4,
        joint_attention_dim=TEXT[1],
        caption_projection_dim=WIDTH,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        **SIZES,
        num_single_layers=2,
        patch_size=1,
        in_channels=8,
        joint_attention_dim=TEXT[1],
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(**SIZES, **LATENT, num_embeds_ada_norm=20)


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, WIDTH),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT[1],
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {"pixart": pixart, "sd3": sd3, "flux": flux, "dit": dit, "unet": unet}


def joint_batch(family: str, step: int) -> Batch:
    """The rows of all ranks together: what the family's forward takes, and its `target`."""
    generator = torch.Generator().manual_seed(1000 + step)

    def noise(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, generator=generator).double()

    times = torch.randint(0, 1000, (ROWS,), generator=generator)
    channels = {"pixart": 8}.get(family, 4)
    batch = {"hidden_states": noise(4, 8, 8), "timestep": times, "target": noise(channels, 8, 8)}
    if family == "dit":
        return batch | {"class_labels": torch.randint(0, 20, (ROWS,), generator=generator)}
    batch["encoder_hidden_states"] = noise(*TEXT)
    if family == "unet":
        batch["sample"] = batch.pop("hidden_states")
    if family in ("sd3", "flux"):
        batch["pooled_projections"] = noise(POOLED)
    if family == "flux":
        batch |= {
            "hidden_states": noise(6, 8),
            "target": noise(6, 8),
            "timestep": times / 1000.0,
            "guidance": times / 9,
        }
    return batch


def output_of(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "target"}
    if "guidance" in batch:  # flux: places of patches and words, the same for all rows
        inputs |= {"img_ids": torch.arange(18.0).view(6, 3) % 5, "txt_ids": torch.zeros(TEXT[0], 3)}
    return model(**inputs).sample


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return (output_of(model, batch) - batch["target"]).square().sum() * LOSS_SCALE / 64


@dataclass(frozen=True)
class Run:
    """`steps` at one stage; then, with `then`, saved, loaded at that stage, and as many again."""

    family: str
    steps: int = 2
    then: int | None = None
    offload: bool = False
    checkpointing: bool = False
    lora: bool = False


@dataclass(frozen=True)
class Result:
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    parameters: dict[str, Tensor]


def make(run: Run) -> nn.Module:
    """In evaluation mode: DiT drops labels at random in training."""
    model = drawn(FAMILIES[run.family]).double().eval()
    if run.lora:
        adapters.add_lora(model, **LORA)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    if run.checkpointing:
        model.enable_gradient_checkpointing()
    return model


def optimizer_of(rule: type, model: nn.Module) -> torch.optim.Optimizer:
    """With a large eps: the bias of keys has no gradient but rounding, which Adam would make a step of."""
    return rule([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2, eps=1e-5)


def train(run: Run, stage: int, folder: str) -> Result:
    """On a rank: its share of each joint batch, through zerolite."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses, norms = [], []
    for stop in (run.steps,) if run.then is None else (run.steps, 2 * run.steps):
        model = zerolite.shard(make(run), stage=stage, offload="cpu" if run.offload else None)
        optimizer = optimizer_of(zerolite.AdamW, model)
        if losses:
            zerolite.load(model, folder, optimizer)
        for step in range(len(losses), stop):
            loss = loss_of(model, part(joint_batch(run.family, step), rank, world))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            norms.append(optimizer.grad_norm)
            optimizer.zero_grad()
        if stop == run.steps and run.then is not None:
            zerolite.save(model, folder, optimizer)
            stage = run.then
    with zerolite.full_params(model):
        return Result(tuple(losses), tuple(norms), whole(model))


def in_fp32(batch: Batch) -> Batch:
    return {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}


def exported(run: Run, stage: int, then: int, folder: str) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """On a rank, in fp32: trained at one stage, exported, loaded at another.

    Returns what it paints, its parameters and the loaded ones.
    """
    model = zerolite.shard(make(run).float(), stage=stage, offload="cpu" if run.offload else None)
    optimizer = optimizer_of(zerolite.AdamW, model)
    loss_of(model, in_fp32(joint_batch(run.family, 0))).backward()
    optimizer.step()
    zerolite.export(model, folder)
    with torch.no_grad(), zerolite.full_params(model):
        output, before = output_of(model, in_fp32(joint_batch(run.family, 1))), whole(model)
    model = zerolite.load_pretrained(folder, stage=then, offload="cpu" if run.offload else None)
    with zerolite.full_params(model):
        return output, before, whole(model)


def twin_of(run: Run) -> tuple[nn.Module, dict[str, str]]:
    """The same model without zerolite, an adapter being PEFT's: (model, its names by those of ours)."""
    from peft import LoraConfig, inject_adapter_in_model

    ours, twin = make(run), make(replace(run, lora=False))
    if run.lora:
        options = {"lora_alpha": LORA["alpha"], "target_modules": ["to_q", "to_k", "to_v"]}
        inject_adapter_in_model(LoraConfig(r=LORA["r"], **options), twin)
    theirs, names = dict(twin.named_parameters()), {}
    for name, parameter in ours.named_parameters():
        layer, _, kind = name.partition(".lora.default.")
        owner, _, end = name.rpartition(".")
        base = f"{owner}.base_layer.{end}"
        names[name] = f"{layer}.{SUFFIXES[kind].format('default')}" if kind else base if base in theirs else name
        with torch.no_grad():
            theirs[names[name]].copy_(parameter)
        assert theirs[names[name]].dtype == parameter.dtype
    assert sorted(names.values()) == sorted(theirs)
    return twin, names


@cache
def reference(run: Run, world: int) -> Result:
    """The same on one process with plain torch and the joint batch."""
    model, names = twin_of(run)
    optimizer = optimizer_of(torch.optim.AdamW, model)
    losses, norms = [], []
    for step in range(run.steps if run.then is None else 2 * run.steps):
        loss = loss_of(model, joint_batch(run.family, step))
        loss.backward()
        divide_gradients(model, world)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item())
        optimizer.step()
        losses.append(loss.item())
        optimizer.zero_grad()
    theirs = whole(model)
    parameters = {ours: theirs[name] for ours, name in names.items()}
    return Result(tuple(losses), tuple(norms), parameters)
