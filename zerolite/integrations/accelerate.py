"""Hugging Face Accelerate: `Accelerator(zero=dict(stage=3, offload="cpu"))` shards what `prepare` is given.

A script changes its import and one argument. torch's AdamW or Adam and schedulers may be built before `prepare`.

    prepare           models are sharded, not wrapped; optimizers become `zerolite.like` them, on the same param groups
    accumulate        zerolite.no_sync; GradientAccumulationPlugin(sync_each_batch=True) keeps gradients sharded instead
    clip_grad_norm_   torch's, on gradient handles; norms are collective
    mixed_precision   autocast and GradScaler stay Accelerate's; parameters stay fp32 unless zero= has a precision
    save_state        zerolite checkpoints beside Accelerate's own files; they load at another stage and world size

What `accelerate` has and this has not: `join_uneven_inputs` on sharded models (use even batches), fp8, and checkpoints
of a plain Accelerator in `load_state`.
"""

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator as PlainAccelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn

import zerolite
from zerolite.engine.engine import Engine, engine_of, find_engine
from zerolite.integrations.sharding import (
    check_scaler,
    engine_stepped_by,
    gather_state_dict,
    shard_arguments,
    shard_on,
    sharded_optimizer,
    uncompiled,
)
from zerolite.optim.base import ShardedOptimizer

# Ways to shard that Accelerate has itself, as its arguments and as what it then says it is distributed by.
OTHER_PLUGINS = ("deepspeed_plugin", "deepspeed_plugins", "fsdp_plugin", "megatron_lm_plugin", "torch_tp_plugin")
OTHER_KINDS = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM, DistributedType.XLA)
# Private names of Accelerate 1.15 that are used here; tests/integrations/test_accelerate.py says which one is gone.
PRIVATE = (
    "_models", "_optimizers", "_save_model_state_pre_hook", "_load_model_state_pre_hook", "_is_accelerate_prepared",
)  # fmt: skip
FOLDER = "zerolite"  # in a folder of save_state; the second model's is zerolite_1


class PreparedOptimizer(AcceleratedOptimizer):
    """Holds `step` and `zero_grad` back inside `accumulate`; `optimizer` is zerolite's."""

    def __init__(self, optimizer: ShardedOptimizer, scaler: torch.amp.GradScaler | None, built: torch.optim.Optimizer):
        """built: what the user gave, which schedulers may refer to."""
        super().__init__(optimizer, device_placement=False, scaler=scaler)
        self.built = built

    @property
    def step_was_skipped(self) -> bool:
        return self._is_overflow or self.optimizer.step_was_skipped


class Accelerator(PlainAccelerator):
    """`accelerate.Accelerator` whose models are sharded by zerolite.

    zero: the arguments of `zerolite.shard`, as `dict(stage=3, offload="cpu")`.

    Collective: `prepare`, `clip_grad_norm_`, steps of optimizers, `get_state_dict`, `save_model`, `save_state` and
    `load_state`. `get_state_dict` is whole on the main process, in host memory, and empty on the others, as with FSDP
    and DeepSpeed.

    Raises TypeError for a `zero` of other keys, ValueError as of `zerolite.shard`, and ValueError for plugins of
    Accelerate that shard in another way (FSDP, DeepSpeed, Megatron-LM, TPUs, parallelism_config), for fp8, and for
    fp16 parameters together with mixed_precision="fp16", which would scale the loss twice.
    """

    _models: list[nn.Module]
    _optimizers: list[PreparedOptimizer]

    def __init__(self, *args, zero: Mapping[str, Any], **kwargs):
        self._sharding = shard_arguments(zero)
        given = inspect.signature(PlainAccelerator.__init__).bind(self, *args, **kwargs).arguments
        for name in (*OTHER_PLUGINS, "parallelism_config"):
            if given.get(name) is not None:
                raise ValueError(f"Accelerator got zero= and {name}=, two ways to shard one model: drop one of them")
        super().__init__(*args, **kwargs)
        if self.distributed_type in OTHER_KINDS or self.parallelism_config:
            raise ValueError(
                f"Accelerator got zero= and was launched for {self.distributed_type.value}, which shards or places "
                "models itself: set distributed_type to MULTI_GPU, MULTI_CPU or NO in `accelerate config`, or start "
                "the script by torchrun"
            )
        if self.fp8_enabled:
            raise ValueError("zerolite computes in fp32, bf16 or fp16, got mixed_precision='fp8': use 'bf16'")

    # Preparation #

    def prepare(self, *args, device_placement=None):
        """As Accelerate's; models are sharded first, in whatever order objects come. Collective."""
        for model in args:
            if isinstance(model, nn.Module) and getattr(model, "_is_accelerate_prepared", False) is not True:
                self._shard(model)
        return super().prepare(*args, device_placement=device_placement)

    def _shard(self, model: nn.Module) -> None:
        check_scaler(shard_on(model, self.device, self.num_processes, self._sharding), self.scaler)

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False):
        """As Accelerate's, autocast included. With evaluation_mode the model is not sharded. Collective."""
        if evaluation_mode:
            return super().prepare_model(model, device_placement, evaluation_mode=True)
        self._shard(model)
        # Accelerate wraps and moves what is trained; a sharded model is where it belongs.
        return super().prepare_model(model, device_placement=False, evaluation_mode=True)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None):
        """zerolite's optimizer on the same param groups; see `zerolite.like` for what is refused.

        ValueError where its model is not sharded, and for a second optimizer of one model.
        """
        if getattr(optimizer, "_is_accelerate_prepared", False):
            return super().prepare_optimizer(optimizer)
        way_out = "give prepare the model in the same call, or earlier"
        sharded = sharded_optimizer(optimizer, way_out)
        if engine_stepped_by(sharded) in [engine_stepped_by(other.optimizer) for other in self._optimizers]:
            raise ValueError(
                "prepare was given a second optimizer of one model, and checkpoints hold the states of one: build one "
                "with several param groups, or shard the parts of the model as models of their own"
            )
        prepared = PreparedOptimizer(sharded, self.scaler, optimizer)
        self._optimizers.append(prepared)
        return prepared

    def prepare_scheduler(self, scheduler):
        """As Accelerate's: a scheduler follows the optimizer that it was built on."""
        prepared = super().prepare_scheduler(scheduler)
        for optimizer in self._optimizers:
            if getattr(scheduler, "optimizer", None) in (optimizer, optimizer.built, optimizer.optimizer):
                prepared.optimizers = [optimizer]
        return prepared

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module):
        """As Accelerate's: backwards inside add up on this rank; a whole gradient is kept at every stage."""
        with zerolite.no_sync(uncompiled(model)) if _is_sharded(model) else super().no_sync(model):
            yield

    @contextlib.contextmanager
    def join_uneven_inputs(self, joinables, even_batches: bool | None = None):
        """As Accelerate's. ValueError for a sharded model, whose ranks run forwards together."""
        if any(isinstance(model, nn.Module) and _is_sharded(model) for model in joinables):
            raise ValueError(
                "join_uneven_inputs was given a sharded model, and every rank must run as many forwards as the others: "
                "leave it out, and even_batches=True as it is by default"
            )
        with super().join_uneven_inputs(joinables, even_batches):
            yield

    # State #

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """Whole values in host memory on the main process, nothing on the others. Collective."""
        if not _is_sharded(model):
            return super().get_state_dict(model, unwrap)
        return gather_state_dict(uncompiled(model))

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **save_model_func_kwargs):
        """As Accelerate's, with a zerolite checkpoint a model in the folder. Collective.

        Hooks of `register_save_state_pre_hook` get the models and, as their weights, empty dicts: `get_state_dict` has
        the values. CheckpointError as of `zerolite.save`.
        """
        with self._apart("_save_model_state_pre_hook", self._save_sharded):
            return super().save_state(output_dir, safe_serialization, **save_model_func_kwargs)

    def load_state(self, input_dir: str | None = None, load_kwargs: dict | None = None, **load_model_func_kwargs):
        """As Accelerate's, at any stage and world size. Collective. CheckpointError as of `zerolite.load`."""
        with self._apart("_load_model_state_pre_hook", self._load_sharded):
            return super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)

    @contextlib.contextmanager
    def _apart(self, hooks: str, work):
        """Inside, Accelerate has no models and optimizers to save or load; where its hooks run, `work` has them.

        work(folder, models, optimizers, the user's hooks)
        """
        before = models, optimizers, user_hooks = self._models, self._optimizers, getattr(self, hooks)

        def hook(_, *arguments) -> None:
            work(arguments[-1], models, optimizers, list(user_hooks.values()))

        self._models, self._optimizers = [], []
        setattr(self, hooks, OrderedDict({0: hook}))
        try:
            yield
        finally:
            self._models, self._optimizers = before[:2]
            setattr(self, hooks, user_hooks)

    def _save_sharded(self, folder: str, models: list[nn.Module], optimizers: list, hooks: list) -> None:
        for hook in hooks:
            hook(models, [{} for _ in models], folder)
        for path, model, optimizer in _checkpoints(folder, models, optimizers):
            zerolite.save(model, path, optimizer)

    def _load_sharded(self, folder: str, models: list[nn.Module], optimizers: list, hooks: list) -> None:
        """A hook removes from its list of models those that it has loaded."""
        left = list(models)
        for hook in hooks:
            hook(left, folder)
        for path, model, optimizer in _checkpoints(folder, models, optimizers):
            if any(engine_of(uncompiled(other)) is engine_of(model) for other in left):
                zerolite.load(model, path, optimizer)


def _checkpoints(folder: str, models: list[nn.Module], optimizers: list):
    """(path, sharded model, its optimizer or None) of each model that was prepared."""
    by_engine: dict[Engine | None, ShardedOptimizer] = {engine_stepped_by(o.optimizer): o.optimizer for o in optimizers}
    for index, model in enumerate(models):
        model = uncompiled(model)
        path = f"{folder}/{FOLDER}" if index == 0 else f"{folder}/{FOLDER}_{index}"
        yield path, model, by_engine.get(engine_of(model))


def _is_sharded(model: nn.Module) -> bool:
    return find_engine(uncompiled(model)) is not None
