"""Lightning: `import zerolite.integrations.lightning`, then `Trainer(strategy="zerolite_stage_3_offload")`; Fabric too.

Strategies by name are `zerolite` (stage 2), `zerolite_stage_0` to `zerolite_stage_3`, and `zerolite_stage_1_offload` to
`zerolite_stage_3_offload`; `ZeroStrategy(stage, offload, precision, units)` has the rest. `configure_optimizers` stays
as it is, with torch's AdamW or Adam and schedulers.

    setup               the LightningModule is sharded, not wrapped; optimizers become `zerolite.like` them
    training_step       called as the module's forward, so that hooks on the module run; manual optimization calls it as
                        it is, since backward may not run inside of a forward
    accumulation        zerolite.no_sync
    gradient_clip_val   torch's clip on gradient handles
    precision           Lightning's: autocast, GradScaler ("16-mixed"), "bf16-true", "64-true"
    checkpoints         folders of zerolite.save, with what Lightning keeps as extra bytes, so one rename commits all
    teardown            moves nothing

These are strategies of the package `lightning` (`lightning.pytorch`, `lightning.fabric`). `pytorch_lightning` has a
registry and classes of its own: its Trainer says that the name is invalid, or the object no strategy.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn

import zerolite
from zerolite.config import Offload, Precision
from zerolite.engine.engine import Engine, find_engine
from zerolite.integrations.fabric import FabricZeroStrategy
from zerolite.integrations.lightning_state import dumped, local_folder, read
from zerolite.integrations.sharding import (
    DEFAULT_STAGE,
    check_options,
    check_scaler,
    shard_arguments,
    shard_on,
    sharded_optimizer,
)
from zerolite.shards.units import UnitRule

__all__ = ["FabricZeroStrategy", "ZeroStrategy"]

# Of DDPStrategy: what says where ranks are. The others say how DistributedDataParallel wraps.
OPTIONS = {
    "accelerator", "parallel_devices", "cluster_environment", "precision_plugin", "process_group_backend", "timeout",
}  # fmt: skip
# Private names of Lightning 2.6 that are used here; tests/integrations/test_lightning.py says which one is gone.
PRIVATE = ("_forward_redirection", "_layer_sync")


class ZeroStrategy(DDPStrategy):
    """Training of a LightningModule that zerolite shards.

    stage, offload, precision, units: of `zerolite.shard`.
    options: `accelerator`, `parallel_devices`, `cluster_environment`, `precision_plugin`, `process_group_backend`,
        `timeout`, as Lightning's DDPStrategy has them.

    Every rank runs the same batches. Refused by name: several optimizers of one module, averages of weights
    (StochasticWeightAveraging, WeightAveraging) at stage 3, clipping by value, CheckpointIO plugins, and checkpoints on
    remote file systems or of another strategy.
    """

    model: Any  # the LightningModule, once `setup` has sharded it
    optimizers: list[torch.optim.Optimizer]

    def __init__(
        self,
        stage: int = DEFAULT_STAGE,
        offload: Offload | str | None = None,
        precision: Precision | None = None,
        units: UnitRule | None = None,
        **options,
    ):
        check_options("ZeroStrategy", options, OPTIONS)
        super().__init__(**options)
        self._sharding = shard_arguments({"stage": stage, "offload": offload, "precision": precision, "units": units})

    @property
    def checkpoint_io(self):
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io) -> None:
        raise ValueError(
            f"checkpoints of ZeroStrategy are folders that every rank writes, and {type(io).__name__} would not be "
            "asked: drop the plugin"
        )

    # Setup and teardown #

    def setup(self, trainer) -> None:
        """Shard the module, and have its optimizers step shards. Collective."""
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        self.accelerator.setup(trainer)
        if find_engine(self.model) is None:
            if is_fitting and self._layer_sync:
                self.model = self._layer_sync.apply(self.model)
            self.model = self.precision_plugin.convert_module(self.model)
        engine = shard_on(self.model, self.root_device, self.world_size, self._sharding)
        self.model_to_device()  # metrics, and what the module says of its device
        if is_fitting:
            _refuse_averages(engine, trainer.callbacks)
            check_scaler(engine, getattr(self.precision_plugin, "scaler", None))
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def setup_optimizers(self, trainer) -> None:
        """zerolite's optimizer for the one of `configure_optimizers`. ValueError where there are several."""
        super().setup_optimizers(trainer)
        if len(self.optimizers) > 1:
            raise ValueError(
                f"configure_optimizers gave {len(self.optimizers)} optimizers, and zerolite's checkpoints hold the "
                "states of one: give one optimizer with several param groups"
            )
        way_out = "build it in configure_optimizers, from parameters of the LightningModule"
        self.optimizers = [sharded_optimizer(optimizer, way_out) for optimizer in self.optimizers]

    def teardown(self) -> None:
        """Shards stay on their device, and offloaded states with their workers."""
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Modules are built on the host, with empty_init on the meta device; shards go to this rank's device."""
        place = torch.device("meta") if empty_init else nullcontext()
        with place, self.precision_plugin.tensor_init_context():
            yield

    # Steps #

    def training_step(self, *args, **kwargs):
        with self.precision_plugin.train_step_context():
            if self.lightning_module.automatic_optimization:
                return self._as_forward("training_step", *args, **kwargs)
            return self.lightning_module.training_step(*args, **kwargs)

    def validation_step(self, *args, **kwargs):
        with self.precision_plugin.val_step_context():
            return self._as_forward("validation_step", *args, **kwargs)

    def test_step(self, *args, **kwargs):
        with self.precision_plugin.test_step_context():
            return self._as_forward("test_step", *args, **kwargs)

    def predict_step(self, *args, **kwargs):
        with self.precision_plugin.predict_step_context():
            return self._as_forward("predict_step", *args, **kwargs)

    def _as_forward(self, name: str, *args, **kwargs):
        return self._forward_redirection(self.lightning_module, self.lightning_module, name, *args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        with zerolite.no_sync(self.model):
            yield

    # Checkpoints #

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False  # `load_checkpoint` does

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # `save_checkpoint` writes parameters and states

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {}

    def load_model_state_dict(self, checkpoint, strict: bool = True) -> None:
        """`load_checkpoint` has loaded it."""

    def load_optimizer_state_dict(self, checkpoint) -> None:
        """`load_checkpoint` has loaded it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath, storage_options=None) -> None:
        """Write a folder. Collective. CheckpointError as of `zerolite.save`, TypeError for storage options."""
        if storage_options is not None:
            raise TypeError("checkpoints of ZeroStrategy are local folders: drop storage_options=")
        folder = local_folder(self.broadcast(filepath))
        optimizers = self.optimizers if "optimizer_states" in checkpoint else []
        zerolite.save(self.model, folder, next(iter(optimizers), None), extra=dumped(checkpoint))

    def load_checkpoint(self, checkpoint_path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder at any stage and world size; returns what Lightning keeps. Collective.

        CheckpointError as of `zerolite.load`. Bytes are read with weights_only=True unless it is False.
        """
        folder = local_folder(self.broadcast(checkpoint_path))
        is_fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        optimizers = self.optimizers if is_fitting else []
        return read(zerolite.load(self.model, folder, next(iter(optimizers), None)), folder, weights_only)


def _refuse_averages(engine: Engine, callbacks: list) -> None:
    """ValueError for a callback that would average parameters that read as NaN."""
    for callback in callbacks:
        if engine.partition.shards_parameters and isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise ValueError(
                f"{type(callback).__name__} reads whole parameters after each step, which stage 3 has sharded: use "
                "stage 2, or drop the callback"
            )


def _register() -> None:
    """The names that `strategy=` takes, for Trainer and Fabric."""
    names: dict[str, dict[str, Any]] = {"zerolite": {}}
    names |= {f"zerolite_stage_{stage}": {"stage": stage} for stage in range(4)}
    names |= {f"zerolite_stage_{stage}_offload": {"stage": stage, "offload": "cpu"} for stage in range(1, 4)}
    for name, options in names.items():
        description = f"zerolite, {options or 'stage 2'}"
        StrategyRegistry.register(name, ZeroStrategy, description, override=True, **options)
        STRATEGY_REGISTRY.register(name, FabricZeroStrategy, description, override=True, **options)


_register()
