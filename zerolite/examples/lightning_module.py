"""A LightningModule: `torchrun --nproc-per-node 2 -m zerolite.examples.lightning_module`, or `python -m` with DEVICES.

A line that ends in `# zerolite` is new; `# was:` is what stood there.
"""

import os

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

import zerolite.integrations.lightning  # noqa: F401  # zerolite
from zerolite.examples.tiny import batches, loss_of, model


class Adder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = model()
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        tokens, targets = batch
        loss = loss_of(self.net(tokens), targets)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        tokens, targets = batch
        self.log("val_loss", loss_of(self.net(tokens), targets), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rows(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [row for tokens, targets in batches(count) for row in zip(tokens, targets, strict=True)]


def main(stage: int = 3, folder: str = "outputs/lightning", ckpt_path: str | None = None):
    module = Adder()
    trainer = pl.Trainer(
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("DEVICES", "1"))),
        # was: strategy="ddp",
        strategy=f"zerolite_stage_{stage}",  # zerolite
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows(8), batch_size=4), DataLoader(rows(2), batch_size=4), ckpt_path=ckpt_path)
    print(f"validation {trainer.callback_metrics['val_loss'].item():.4f}")
    return module.losses, module


if __name__ == "__main__":
    main()
