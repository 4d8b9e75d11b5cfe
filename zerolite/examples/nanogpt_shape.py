"""A script of nanoGPT's shape, with its own GPT: `torchrun --nproc-per-node 2 -m zerolite.examples.nanogpt_shape`.

A line that ends in `# zerolite` is new; `# was:` is what stood there. What stays as it was: the optimizer that the
model builds itself, GradScaler, clipping by torch, accumulation, the schedule by hand, autocast. Evaluation ran on the
master alone, and still does: inside `full_params` a forward communicates nothing.
"""

import math
import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# was: from torch.nn.parallel import DistributedDataParallel
import zerolite  # zerolite


@dataclass
class GPTConfig:
    block_size: int = 16
    vocab_size: int = 32
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        rows, length, width = x.shape
        heads = self.qkv(self.ln_1(x)).view(rows, length, 3, self.n_head, width // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.out(F.gelu(self.fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas):
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def get_batch(generator, config, device):
    """Sequences that count upwards: a stand-in for a memory-mapped file of tokens."""
    start = torch.randint(0, config.vocab_size, (4, 1), generator=generator)
    tokens = (start + torch.arange(config.block_size + 1)) % config.vocab_size
    return tokens[:, :-1].to(device), tokens[:, 1:].to(device)


def main(stage: int = 3, out_dir: str = "outputs/nanogpt", max_iters: int = 6, dtype: str = "float32", init_from=""):
    eval_interval, gradient_accumulation_steps, grad_clip = 3, 2, 1.0
    ddp = int(os.environ.get("RANK", -1)) != -1
    if ddp and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank() if ddp else 0
    master_process = rank == 0
    torch.manual_seed(1337)
    config = GPTConfig()
    model = GPT(config)
    generator = torch.Generator().manual_seed(1337 + rank)
    # was: optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
    # was: if ddp:
    # was:     model = DistributedDataParallel(model)
    model = zerolite.shard(model, stage=stage)  # zerolite
    optimizer = zerolite.like(model.configure_optimizers(0.1, 1e-2, (0.9, 0.95)))  # zerolite
    device = next(model.parameters()).device
    iter_num, losses, evaluations = 0, [], []
    if init_from:
        # was: checkpoint = torch.load(init_from, weights_only=True)
        # was: getattr(model, "module", model).load_state_dict(checkpoint["model"])
        # was: optimizer.load_state_dict(checkpoint["optimizer"])
        checkpoint = zerolite.load(model, init_from, optimizer)  # zerolite
        iter_num = checkpoint["iter_num"]
        for _ in range(iter_num * gradient_accumulation_steps):
            get_batch(generator, config, device)
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    ctx = torch.autocast(device.type, half) if half else nullcontext()
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=dtype == "float16")

    @torch.no_grad()
    def estimate_loss():
        model.eval()
        held_out = torch.Generator().manual_seed(7)
        # was: raw_model = getattr(model, "module", model)
        # was: loss = sum(raw_model(*get_batch(held_out, config, device))[1].item() for _ in range(2)) / 2
        loss = sum(model(*get_batch(held_out, config, device))[1].item() for _ in range(2)) / 2  # zerolite
        model.train()
        return loss

    while iter_num < max_iters:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * iter_num / max_iters)))
        # was: if iter_num % eval_interval == 0 and master_process:
        # was:     evaluations.append(estimate_loss())
        # was:     raw_model = getattr(model, "module", model)
        # was:     checkpoint = {"model": raw_model.state_dict(), "optimizer": optimizer.state_dict()}
        # was:     torch.save({**checkpoint, "iter_num": iter_num}, out_dir)
        if iter_num % eval_interval == 0:  # zerolite
            with zerolite.full_params(model):  # zerolite
                evaluations += [estimate_loss()] if master_process else []  # zerolite
            zerolite.save(model, out_dir, optimizer, extra={"iter_num": iter_num})  # zerolite
        for micro_step in range(gradient_accumulation_steps):
            # was: if ddp:
            # was:     model.require_backward_grad_sync = micro_step == gradient_accumulation_steps - 1
            with ctx:
                _, loss = model(*get_batch(generator, config, device))
                loss = loss / gradient_accumulation_steps
            # was: scaler.scale(loss).backward()
            with zerolite.no_sync(model, enabled=micro_step < gradient_accumulation_steps - 1):  # zerolite
                scaler.scale(loss).backward()  # zerolite
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() * gradient_accumulation_steps)
        iter_num += 1
    if master_process:
        print(f"train {losses[-1]:.4f}, evaluations {[round(loss, 4) for loss in evaluations]}")
    return losses, model


if __name__ == "__main__":
    main()
