"""A plain PyTorch loop with three changed lines: `torchrun --nproc-per-node 2 -m zerolite.examples.plain_loop`.

A line that ends in `# zerolite` is new; `# was:` is what stood there.
"""

import os

import torch

import zerolite  # zerolite
from zerolite.examples.tiny import batches, loss_of, model


def main(stage: int = 3, steps: int = 12):
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    net = model()
    # was: optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    net = zerolite.shard(net, stage=stage)  # zerolite
    optimizer = zerolite.AdamW(net.parameters(), lr=1e-2)  # zerolite
    device = next(net.parameters()).device
    losses = []
    for tokens, targets in batches(steps, rank, world):
        loss = loss_of(net(tokens.to(device)), targets.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, net


if __name__ == "__main__":
    print(f"losses {[round(loss, 3) for loss in main()[0]]}")
