"""A script on torch's FSDP2 (`fully_shard`) on zerolite: `torchrun --nproc-per-node 2 -m zerolite.examples.from_fsdp2`.

A line that ends in `# zerolite` is new; `# was:` is what stood there.
"""

import torch
import torch.distributed as dist

import zerolite  # zerolite
from zerolite.examples.tiny import batches, loss_of, model

# was: import torch.distributed.checkpoint as dcp
# was: from torch.distributed.checkpoint.state_dict import get_state_dict
# was: from torch.distributed.fsdp import fully_shard


ACCUMULATION = 2


def main(stage: int = 3, steps: int = 12, folder: str = "outputs/from_fsdp2"):
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    net = model()
    # was: for block in net.blocks:
    # was:     fully_shard(block)
    # was: fully_shard(net)
    net = zerolite.shard(net, stage=stage)  # zerolite
    device = next(net.parameters()).device
    # was: optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = zerolite.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)  # zerolite
    losses = []
    for index, (tokens, targets) in enumerate(batches(steps, rank, world), start=1):
        is_last = index % ACCUMULATION == 0
        # was: net.set_requires_gradient_sync(is_last)
        # was: loss = loss_of(net(tokens.to(device)), targets.to(device))
        # was: (loss / ACCUMULATION).backward()
        with zerolite.no_sync(net, enabled=not is_last):  # zerolite
            loss = loss_of(net(tokens.to(device)), targets.to(device))  # zerolite
            (loss / ACCUMULATION).backward()  # zerolite
        losses.append(loss.item())
        if is_last:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    # was: weights, states = get_state_dict(net, optimizer)
    # was: dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    zerolite.save(net, folder, optimizer)  # zerolite
    return losses, net


if __name__ == "__main__":
    print(f"losses {[round(loss, 3) for loss in main()[0]]}")
