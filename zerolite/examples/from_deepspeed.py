"""A script on a DeepSpeed engine on zerolite: `torchrun --nproc-per-node 2 -m zerolite.examples.from_deepspeed`.

A line that ends in `# zerolite` is new; `# was:` is what stood there. DeepSpeed's "Adam" decouples weight decay by
default (adam_w_mode), so it is zerolite's AdamW; "auto" values and bucket sizes have no counterpart and need none.
"""

import torch
import torch.distributed as dist

import zerolite  # zerolite
from zerolite.examples.tiny import batches, loss_of, model

# was: import deepspeed


ACCUMULATION = 2
# was: CONFIG = {
# was:     "train_micro_batch_size_per_gpu": 4,
# was:     "gradient_accumulation_steps": ACCUMULATION,
# was:     "gradient_clipping": 1.0,
# was:     "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "weight_decay": 0.1}},
# was:     "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
# was: }


def main(stage: int = 3, steps: int = 12, folder: str = "outputs/from_deepspeed"):
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    # was: engine, optimizer, _, _ = deepspeed.initialize(model=model(), config=CONFIG)
    # was: device = engine.device
    engine = zerolite.shard(model(), stage=stage, offload="cpu")  # zerolite
    optimizer = zerolite.AdamW(engine.parameters(), lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)  # zerolite
    device = next(engine.parameters()).device  # zerolite
    losses = []
    for index, (tokens, targets) in enumerate(batches(steps, rank, world), start=1):
        # was: loss = loss_of(engine(tokens.to(device)), targets.to(device))
        # was: engine.backward(loss)
        is_last = index % ACCUMULATION == 0  # zerolite
        with zerolite.no_sync(engine, enabled=not is_last):  # zerolite
            loss = loss_of(engine(tokens.to(device)), targets.to(device))  # zerolite
            (loss / ACCUMULATION).backward()  # zerolite
        losses.append(loss.item())
        # was: engine.step()
        if is_last:  # zerolite
            optimizer.step()  # zerolite
            optimizer.zero_grad()  # zerolite
    # was: engine.save_checkpoint(folder)
    zerolite.save(engine, folder, optimizer)  # zerolite
    return losses, engine


if __name__ == "__main__":
    print(f"losses {[round(loss, 3) for loss in main()[0]]}")
