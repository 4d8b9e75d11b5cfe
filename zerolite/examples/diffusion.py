"""A diffusion transformer that learns to paint: `torchrun --nproc-per-node 2 -m zerolite.examples.diffusion --stage 3`.

It starts from random values and sees pictures of coloured shapes beside their prompts (shapes.py). Then it paints what
a prompt asks for, and LoRA on its attention teaches it a colour that it has not seen. The model is PixArt's transformer
of diffusers, small; the last folder opens in diffusers. Needs diffusers and matplotlib.

A line that ends in `# zerolite` is new; `# was:` is what stood there.
"""

import argparse
import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# was: from torch.nn.parallel import DistributedDataParallel
import zerolite  # zerolite
from zerolite import adapters
from zerolite.examples import shapes

STEPS, ROWS = 1600, 24  # optimizer steps; pictures of each, over all ranks
WIDTH, HEADS, LAYERS = 96, 4, 3
COLOURS, NEW_COLOURS = [*shapes.COLOURS][:-1], [*shapes.COLOURS][-1:]
SAVED = 500  # steps between checkpoints
AVERAGED = 10  # steps between updates of the average, which keeps DECAY of itself
DECAY = 0.9
PAINTED = 25  # Euler steps of a picture
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def build() -> PixArtTransformer2DModel:
    """Captions are one-hot words, so the model's own projection of captions is the text embedding."""
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        num_layers=LAYERS,
        cross_attention_dim=WIDTH,
        caption_channels=len(shapes.WORDS),
        in_channels=3,
        out_channels=3,
        sample_size=shapes.SIZE,
        patch_size=4,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".scale_shift_table"):  # a block's
                parameter[[2, 5]] = 1.0  # the gates of attention and MLP: nearly shut, it would learn late
    return model


def batches(colours: list[str], steps: range, rank: int, world: int) -> Iterator[tuple[Tensor, ...]]:
    """This rank's rows of each step: pictures, words, noise and times. A step's number is its seed."""
    every = [*itertools.product(colours, shapes.SHAPES)]
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        pairs = [every[index] for index in torch.randint(len(every), (ROWS,), generator=generator)]
        pictures = shapes.draw(pairs, generator)
        languages = torch.randint(10, (ROWS,), generator=generator).tolist()  # one in ten has no prompt
        prompts = [
            shapes.prompt_of(pair, is_chinese=choice % 2 == 0) if choice else ""
            for pair, choice in zip(pairs, languages, strict=True)
        ]
        noise, times = (torch.randn(size, generator=generator) for size in (pictures.shape, (ROWS,)))
        times = times.sigmoid()  # most in the middle (Esser et al. 2024, arXiv 2403.03206)
        yield tuple(whole[rank::world] for whole in (pictures, shapes.encode(prompts), noise, times))


def loss_of(model: nn.Module, pictures: Tensor, words: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Flow matching (Lipman et al. 2022, arXiv 2210.02747): at time t a picture is (1 - t) picture + t noise.

    The model says the picture, and the loss is the error of the velocity that follows from it (Li and He 2025, arXiv
    2511.13720).
    """
    t = times[:, None, None, None]
    painted = model((1 - t) * pictures + t * noise, encoder_hidden_states=words, timestep=1000 * times).sample
    return ((painted - pictures) / t.clamp(min=0.05)).square().mean()


@torch.no_grad()
def paint(model: nn.Module, prompts: list[str], guidance: float = 3.0) -> Tensor:
    """From noise to pictures by Euler steps, with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""
    device, size = next(model.parameters()).device, (len(prompts), 3, shapes.SIZE, shapes.SIZE)
    pictures = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
    words = shapes.encode([*prompts, *[""] * len(prompts)]).to(device)
    for step in range(PAINTED, 0, -1):
        t, twice = step / PAINTED, torch.cat([pictures, pictures])
        times = torch.full((len(twice),), 1000 * t, device=device)
        painted = model(twice, encoder_hidden_states=words, timestep=times).sample
        asked, unasked = ((twice - painted) / t).chunk(2)
        pictures = pictures - (unasked + guidance * (asked - unasked)) / PAINTED
    return pictures


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterator[tuple[Tensor, ...]]) -> Iterator[float]:
    """An optimizer step a batch; the loss on this rank's rows."""
    device = next(model.parameters()).device
    for batch in data:
        loss = loss_of(model, *(rows.to(device) for rows in batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def place() -> tuple[int, int]:
    """This rank and the number of ranks."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def main(stage: int = 3, offload: str | None = None, steps: int = STEPS, folder: str = "outputs/diffusion", resume=""):
    """Train from random values, with checkpoints in `folder`; (losses, the model with averaged parameters)."""
    rank, world = place()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    model = build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    # was: optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    # was: model = DistributedDataParallel(model)
    model = zerolite.shard(model, stage=stage, offload=offload)  # zerolite
    optimizer = zerolite.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)  # zerolite
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50, (steps - step) / 400))
    first = 0
    if resume:
        # was: saved = torch.load(resume, weights_only=True)
        # was: model.module.load_state_dict(saved["model"])
        # was: optimizer.load_state_dict(saved["optimizer"])
        saved = zerolite.load(model, resume, optimizer)  # zerolite
        schedule.load_state_dict(saved["schedule"])
        average.load_state_dict(saved["average"])
        first = saved["step"]
    losses = []
    for step, loss in enumerate(learn(model, optimizer, batches(COLOURS, range(first, steps), rank, world)), first + 1):
        losses.append(loss)
        schedule.step()
        if step % AVERAGED == 0:
            # was: average.update_parameters(model.module)
            with zerolite.full_params(model):  # zerolite
                average.update_parameters(model)  # zerolite
        if step % SAVED == 0 and step < steps:
            state = {"step": step, "schedule": schedule.state_dict(), "average": average.state_dict()}
            # was: if rank == 0:
            # was:     state |= {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
            # was:     torch.save(state, f"{folder}/step-{step}")
            zerolite.save(model, f"{folder}/step-{step}", optimizer, extra=state)  # zerolite
        if rank == 0 and step % 100 == 0:
            print(f"step {step} of {steps}: loss {sum(losses[-100:]) / len(losses[-100:]):.3f}", flush=True)
    # was: with torch.no_grad():
    with torch.no_grad(), zerolite.full_params(model, writeback=True):  # zerolite
        for parameter, mean in zip(model.parameters(), average.module.parameters(), strict=True):
            parameter.copy_(mean)
    return losses, model


def adapt(folder: str, stage: int, offload: str | None, steps: int) -> nn.Module:
    """LoRA on the attention of the model in `folder` learns new colours; the sharded model."""
    add_lora = partial(adapters.add_lora, r=8, alpha=16, dropout=0.0, targets=LORA_TARGETS)
    model = zerolite.load_pretrained(folder, stage, offload=offload, adapt=add_lora)
    optimizer = zerolite.AdamW(adapters.parameter_groups(model, lr=2e-3))
    for _ in learn(model, optimizer, batches(NEW_COLOURS, range(steps), *place())):
        pass
    return model


def painted(model: nn.Module, colours: list[str], is_chinese: bool = False) -> tuple[list[shapes.Pair], Tensor]:
    """Every one of the colours with every shape: pairs and pictures."""
    pairs = [*itertools.product(colours, shapes.SHAPES)]
    return pairs, paint(model, [shapes.prompt_of(pair, is_chinese) for pair in pairs])


def program(stage: int, offload: str | None, steps: int, folder: str, resume: str) -> None:
    """Train, export, adapt; tell what the judge sees, and write samples.png."""
    rank, _ = place()
    torch.manual_seed(0)
    before = painted(build(), COLOURS)
    model = main(stage, offload, steps, folder, resume)[1]
    with zerolite.full_params(model):
        english, chinese = painted(model, COLOURS), painted(model, COLOURS, is_chinese=True)
        unseen = painted(model, NEW_COLOURS)
    zerolite.export(model, f"{folder}/model")
    model = adapt(f"{folder}/model", stage, offload, steps // 5)
    with zerolite.full_params(model):
        learned = painted(model, NEW_COLOURS)
    adapters.save(model, f"{folder}/adapter")
    if rank == 0:
        sections = {"before": before, "after": english, "after, in Chinese": chinese}
        sections |= {"a colour that it never saw": unseen, "after LoRA": learned}
        shapes.sheet(sections, Path(folder) / "samples.png")
        said = [f"{title}: {shapes.share(pictures, pairs)}\n" for title, (pairs, pictures) in sections.items()]
        (Path(folder) / "samples.txt").write_text("".join(said), encoding="utf-8")
        print(*said, sep="", end="")
        print(f"pictures: {folder}/samples.png; model: {folder}/model; adapter: {folder}/adapter")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, help="0 to 3 (default 2)")
    parser.add_argument("--offload", choices=["cpu"], help="gradients and optimizer states in host memory")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps; LoRA has a fifth of them more")
    parser.add_argument("--folder", default="outputs/diffusion")
    parser.add_argument("--resume", default="", help="a checkpoint: outputs/diffusion/step-500")
    program(**vars(parser.parse_args()))
