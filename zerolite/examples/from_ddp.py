"""A DistributedDataParallel script on zerolite: `torchrun --nproc-per-node 2 -m zerolite.examples.from_ddp`.

A line that ends in `# zerolite` is new; `# was:` is what stood there.
"""

import contextlib

import torch
import torch.distributed as dist

import zerolite  # zerolite
from zerolite.examples.tiny import batches, loss_of, model

# was: from torch.nn.parallel import DistributedDataParallel


ACCUMULATION = 2


def main(stage: int = 3, steps: int = 12, folder: str = "outputs/from_ddp"):
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    net = model()
    # was: net = DistributedDataParallel(net)
    net = zerolite.shard(net, stage=stage)  # zerolite
    device = next(net.parameters()).device
    # was: optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = zerolite.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)  # zerolite
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps // ACCUMULATION)
    losses = []
    for index, (tokens, targets) in enumerate(batches(steps, rank, world), start=1):
        is_last = index % ACCUMULATION == 0
        # was: with contextlib.nullcontext() if is_last else net.no_sync():
        with contextlib.nullcontext() if is_last else zerolite.no_sync(net):  # zerolite
            loss = loss_of(net(tokens.to(device)), targets.to(device))
            (loss / ACCUMULATION).backward()
        losses.append(loss.item())
        if is_last:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    # was: if rank == 0:
    # was:     state = {"model": net.module.state_dict(), "optimizer": optimizer.state_dict()}
    # was:     torch.save({**state, "scheduler": scheduler.state_dict()}, folder)
    zerolite.save(net, folder, optimizer, extra={"scheduler": scheduler.state_dict()})  # zerolite
    return losses, net


if __name__ == "__main__":
    print(f"losses {[round(loss, 3) for loss in main()[0]]}")
