"""Lightning Fabric: `Fabric(strategy="zerolite_stage_3")` once `zerolite.integrations.lightning` is imported.

`setup`, `setup_module`, `setup_optimizers`, `backward`, `no_backward_sync`, `clip_gradients`, `save` and `load` work as
with DDP, for torch's AdamW and Adam that were built before or after `setup`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import nn

import zerolite
from zerolite.config import Offload, Precision
from zerolite.engine.engine import find_engine
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

# Private names of Lightning 2.6 that are used here; tests/integrations/test_fabric.py says which one is gone.
PRIVATE = ("_backward_sync_control",)
OPTIONS = {"accelerator", "parallel_devices", "cluster_environment", "process_group_backend", "timeout"}


class ForwardModule(nn.Module):
    """Calls the sharded module. Fabric redirects `training_step` and marked methods through what wraps a module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class FabricZeroStrategy(DDPStrategy):
    """Training of modules that zerolite shards, each with at most one optimizer.

    stage, offload, precision, units: of `zerolite.shard`; Fabric's `precision=` (autocast, GradScaler) is beside it.
    options: `accelerator`, `parallel_devices`, `cluster_environment`, `process_group_backend`, `timeout`, as
        Lightning's DDPStrategy has them.
    """

    def __init__(
        self,
        stage: int = DEFAULT_STAGE,
        offload: Offload | str | None = None,
        precision: Precision | None = None,
        units: UnitRule | None = None,
        **options,
    ):
        check_options("FabricZeroStrategy", options, OPTIONS)
        super().__init__(**options)
        self._sharding = shard_arguments({"stage": stage, "offload": offload, "precision": precision, "units": units})
        self._backward_sync_control = _SyncControl()

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager:
        """Modules are built on the host, with empty_init on the meta device; shards go to this rank's device."""
        stack = ExitStack()
        stack.enter_context(torch.device("meta") if empty_init else nullcontext())
        stack.enter_context(self.precision.module_init_context())
        return stack

    def module_to_device(self, module: nn.Module) -> None:
        """Nothing: a module that is set up next goes there a unit at a time, others by `module.to(fabric.device)`."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Shard it. Collective."""
        engine = shard_on(module, self.root_device, self.world_size, self._sharding)
        check_scaler(engine, getattr(self.precision, "scaler", None))
        module.to(self.root_device)  # metrics, and what a LightningModule says of its device
        return ForwardModule(module)

    def setup_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """zerolite's on the same param groups, as `zerolite.like`."""
        return sharded_optimizer(optimizer, "set its module up in the same call, or earlier")

    # Checkpoints #

    def save_checkpoint(self, path, state: Mapping[str, Any], storage_options=None, filter=None) -> None:
        """Write a folder with the sharded module of `state`, its optimizer, and the rest. Collective.

        ValueError where `state` has not exactly one sharded module and at most one optimizer, and for a filter.
        """
        if storage_options is not None or filter is not None:
            raise ValueError(
                "zerolite's checkpoints are local folders of whole states: drop storage_options and filter"
            )
        module, optimizer, rest = _parted(state)
        values = {name: _state_of(value) for name, value in rest.items()}
        zerolite.save(module, local_folder(self.broadcast(path)), optimizer, extra=dumped(values))

    def load_checkpoint(
        self, path, state=None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a folder into what `state` has; returns what it has not. Collective.

        A module alone takes a file with a plain state dict (`Fabric.load_raw`).
        """
        if isinstance(state, nn.Module):
            with zerolite.full_params(_sharded(state), writeback=True):
                return super().load_checkpoint(path, _sharded(state), strict, weights_only)
        if not isinstance(state, dict):
            raise ValueError("zerolite's checkpoints load into a state with the sharded module: pass state={...}")
        module, optimizer, rest = _parted(state)
        folder = local_folder(self.broadcast(path))
        saved = read(zerolite.load(module, folder, optimizer), folder, weights_only)
        missing = sorted(rest.keys() - saved.keys())
        if missing and strict:
            raise KeyError(f"{folder} has no {', '.join(missing)}, only {', '.join(saved)}: pass strict=False")
        for name in rest.keys() & saved.keys():
            value = saved.pop(name)
            if hasattr(rest[name], "load_state_dict"):
                rest[name].load_state_dict(value)
            else:
                state[name] = value
        return saved


class _SyncControl(_BackwardSyncControl):
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager:
        return zerolite.no_sync(_sharded(module), enabled)


def _sharded(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, ForwardModule) else module


def _parted(state: Mapping[str, Any]) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The sharded module of a state, its optimizer or None, and the rest by name."""
    modules = {name: _sharded(value) for name, value in state.items() if isinstance(value, nn.Module)}
    modules = {name: module for name, module in modules.items() if find_engine(module) is not None}
    optimizers = {name: value for name, value in state.items() if getattr(value, "steps_shards", False)}
    if len(modules) != 1 or len(optimizers) > 1:
        raise ValueError(
            f"a zerolite checkpoint has one sharded module and at most one optimizer of it, got {len(modules)} and "
            f"{len(optimizers)}: save each module with its optimizer to a folder of its own"
        )
    rest = {name: value for name, value in state.items() if name not in modules and name not in optimizers}
    return next(iter(modules.values())), next(iter(optimizers.values()), None), rest


def _state_of(value: Any) -> Any:
    getter: Callable[[], Any] | None = getattr(value, "state_dict", None)
    return getter() if callable(getter) else value
