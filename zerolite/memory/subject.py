"""A model that plans are made for: built once without memory, its step run once on fake tensors, used by many plans."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from zerolite.config import Precision
from zerolite.engine.engine import find_engine
from zerolite.engine.extensions import extensions_of
from zerolite.engine.shardable import check_parameters, is_computed_in
from zerolite.memory import activations, presets
from zerolite.memory.moments import Profile
from zerolite.shards.dtensors import is_distributed
from zerolite.shards.units import UnitPlan, UnitRule, plan_units


@dataclass(frozen=True)
class Inputs:
    """What one micro-batch of one rank is; `batch` None: model states alone are planned."""

    batch: int | None = 1
    length: int = 2048
    checkpointing: bool | None = None  # None: as the model is set
    chunked_loss: bool = False


class Subject:
    """A model to plan for, with what was found out about it: plans of many configurations run it once.

    The model stays as it is.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        adapt: Callable[[nn.Module], object] | None = None,
        units: UnitRule | None = None,
        step: activations.Step | None = None,
    ):
        """Raises ValueError for a name that is no model, a sharded model, and one that cannot be sharded."""
        self.name = presets.name_of(model)
        self.model = model if isinstance(model, nn.Module) else presets.build(model)
        if find_engine(self.model) is not None:
            raise ValueError(f"this {self.name} is sharded already: plan before zerolite.shard, measure after it")
        if adapt is not None:
            adapt(self.model)
        check_parameters(self.model)
        distributed = next((name for name, p in self.model.named_parameters() if is_distributed(p)), None)
        if distributed is not None:
            raise ValueError(
                f"{distributed} is a DTensor, and a plan does not count tensor parallelism: plan the model as it was "
                "before parallelize_module; its ranks share what that splits"
            )
        self.units, self.step = units, step
        self._plans: dict[torch.dtype | None, list[UnitPlan]] = {}
        self._profiles: dict[tuple, Profile] = {}

    def numel(self, only_trainable: bool = False) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad or not only_trainable)

    def unit_plans(self, precision: Precision | None) -> list[UnitPlan]:
        key = precision.param if precision is not None else None
        if key not in self._plans:
            stays = [p for extension in extensions_of(self.model) for p in extension.stays_unsharded(self.model)]
            self._plans[key] = plan_units(self.model, self.units, self.dtype_of(precision), stays)
        return self._plans[key]

    @staticmethod
    def dtype_of(precision: Precision | None) -> Callable[[nn.Parameter], torch.dtype]:
        def dtype_of(parameter: nn.Parameter) -> torch.dtype:
            return precision.param if precision is not None and is_computed_in(parameter.dtype) else parameter.dtype

        return dtype_of

    def profile(self, precision: Precision | None, inputs: Inputs) -> Profile:
        """Of one micro-batch; run once for equal arguments."""
        key = (precision.param if precision is not None else None, inputs)
        if key not in self._profiles:
            plans = self.unit_plans(precision)
            if inputs.batch is None:
                self._profiles[key] = Profile.without_activations(plans)
            else:
                with (
                    _checkpointing(self.model, inputs.checkpointing),
                    presets.rows_are_not_packed(),
                    activations.scaled_output(self.model, precision),
                ):
                    step = self._step(inputs.batch, inputs)
                    self._profiles[key] = activations.profile(self.model, plans, self.dtype_of(precision), step)
        return self._profiles[key]

    def _step(self, batch: int, inputs: Inputs) -> activations.Step:
        if self.step is not None:
            return self.step
        presets.check_language_model(self.model, inputs.chunked_loss)
        longest = presets.longest(self.model)
        if longest is not None and inputs.length > longest:
            raise ValueError(f"length={inputs.length}: {self.name} reads at most {longest} tokens")
        return presets.language_model_step(batch, inputs.length, inputs.chunked_loss)


class _checkpointing:
    """Inside, a model of transformers recomputes its blocks in backward, or does not."""

    def __init__(self, model: nn.Module, wanted: bool | None):
        self.model, self.wanted = model, wanted
        if wanted is not None and not hasattr(model, "gradient_checkpointing_enable"):
            raise ValueError(
                f"checkpointing={wanted} sets it on models of transformers, and this is a {type(model).__name__}: wrap "
                "its blocks yourself and leave checkpointing=None"
            )
        self.is_changed = wanted is not None and wanted != is_checkpointing(model)

    def __enter__(self) -> None:
        if self.is_changed:
            self._set(bool(self.wanted))

    def __exit__(self, *error: object) -> None:
        if self.is_changed:
            self._set(not self.wanted)

    def _set(self, is_on: bool) -> None:
        """Later releases of transformers call it "activation", and warn of the earlier name."""
        name = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
        if is_on:
            options = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(self.model, f"{name}_checkpointing_enable")(**options)
        else:
            getattr(self.model, f"{name}_checkpointing_disable")()


def is_checkpointing(model: nn.Module) -> bool:
    """Whether some block of a model of transformers is recomputed in backward."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
