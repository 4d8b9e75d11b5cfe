"""Does a LightningModule train, evaluate, save and go on with `strategy="zerolite..."` as it does on DDP?"""

from __future__ import annotations

import inspect
import os

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning_runs import Module, Run, fit, parameters_of, trainer_of
from trainer_tasks import largest_difference, loader, loss_of, optimizer_of

import zerolite
from zerolite.integrations import lightning as integration
from zerolite.integrations.lightning import ZeroStrategy

ULPS = 1e-14


def assert_same_run(run: Run, expected: Run) -> None:
    assert run.losses == pytest.approx(expected.losses, abs=ULPS, rel=0) and run.losses
    assert run.rates == expected.rates
    assert not run.syncs or run.syncs == [False, True] * (len(run.losses) // 2)
    assert run.evaluations == pytest.approx(expected.evaluations, abs=ULPS, rel=0)
    assert largest_difference(run.parameters, expected.parameters) < 1e-12


def resumed(strategy: str, world: int, folder: str, at: str, then: str) -> list[Run]:
    """One run that keeps its best and its last checkpoint, and runs that go on from them."""
    keep = {"every_n_train_steps": 1, "save_top_k": 1, "monitor": "step", "mode": "max", "save_last": True}
    callback = ModelCheckpoint(f"{folder}/{at}", "{step}", **keep)
    runs = [fit(strategy, world, folder, enable_checkpointing=True, callbacks=[callback], limit_train_batches=4)]
    assert sorted(os.listdir(f"{folder}/{at}")) == ["last.ckpt", "step=2.ckpt"]
    for name in ("step=2.ckpt", "last.ckpt"):
        runs.append(fit(then, world, folder, load=f"{folder}/{at}/{name}", max_epochs=2))
    return runs


def stages_on_rank(world: int, stages: list[int], folder: str) -> tuple[list[tuple[Run, Run]], list[float]]:
    """(a run, that of DDP), and how far offload is from none."""
    expected = fit("ddp", world, folder)
    pairs = [(fit(f"zerolite_stage_{stage}", world, folder), expected) for stage in stages]
    own = resumed("zerolite_stage_1", world, folder, "zerolite", "zerolite_stage_3")
    pairs += zip(own, resumed("ddp", world, folder, "ddp", "ddp"), strict=True)
    bits = [fit(name, world, folder, dtype=torch.float32) for name in ("zerolite_stage_3", "zerolite_stage_3_offload")]
    return pairs, [largest_difference(*(run.parameters for run in bits))]


def check_stages(ranks, world: int, stages: list[int], folder: str) -> None:
    for pairs, bits in ranks(world).run(stages_on_rank, world, stages, folder):
        for run, expected in pairs:
            assert_same_run(run, expected)
        assert len(pairs[0][0].evaluations) == 1 and bits == [0.0]
    assert sorted(os.listdir(f"{folder}/zerolite/last.ckpt")) == sorted(
        ["manifest.json", *(f"rank-0000{rank}.safetensors" for rank in range(world))]
    )


@pytest.mark.parametrize(("world", "stages"), [(1, [2]), (2, [1, 3])])
def test_a_module_trains_as_on_ddp_and_goes_on_at_another_stage(ranks, tmp_path, world, stages):
    """Accumulation, clipping, a schedule, uneven labels and validation in between; the resumed part, too."""
    check_stages(ranks, world, stages, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_all_stages_train_as_on_ddp(ranks, tmp_path, world):
    check_stages(ranks, world, [0, 1, 2, 3], str(tmp_path))


def fp16() -> MixedPrecision:
    """What Lightning takes for "16-mixed" on a GPU; on a CPU it would take bf16."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


def precisions_on_rank(folder: str) -> list[list[Run]]:
    ways = [lambda: {"precision": "bf16-mixed"}, lambda: {"plugins": [fp16()]}]
    runs = [[fit(name, 2, folder, dtype=torch.float32, **way()) for name in ("zerolite", "ddp")] for way in ways]
    own = ZeroStrategy(3, precision=zerolite.Precision(torch.bfloat16))
    return [*runs, [fit(own, 2, folder, dtype=torch.float32), runs[0][1]]]


def test_autocast_and_scaling_are_those_of_ddp(ranks, tmp_path):
    *pairs, (own, expected) = ranks(2).run(precisions_on_rank, str(tmp_path))[0]
    assert own.losses == pytest.approx(expected.losses, abs=0.02)  # of zerolite's own bf16
    for run, expected in pairs:
        assert run.losses == pytest.approx(expected.losses, abs=1e-6)
        assert largest_difference(run.parameters, expected.parameters) < 1e-6


class Manual(Module):
    """Two steps in one training_step; a parameter of the root's own."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__(dtype)
        self.automatic_optimization = False
        self.net.factor = torch.nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, inputs):
        return self.net(inputs) * self.net.factor

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        for _ in range(2):
            loss = loss_of(self(batch[0]), batch[1])
            self.run.losses.append(loss.item())
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def manual_on_rank(folder: str) -> list[Run]:
    options = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    return [fit(name, 2, folder, module=Manual(), **options) for name in ("ddp", "zerolite_stage_3", "zerolite")]


def test_manual_optimization_trains_as_on_ddp(ranks, tmp_path):
    expected, *runs = ranks(2).run(manual_on_rank, str(tmp_path))[0]
    for run in runs:
        assert_same_run(run, expected)


class Head(Module):
    def predict_step(self, batch, index):
        return self.net(batch[0])


def evaluation_on_rank(folder: str) -> list:
    """Losses and predictions without a fit, then what is left of a module when a trainer is done with it."""
    found = []
    for name in ("ddp", "zerolite_stage_3"):
        trainer, module = trainer_of(name, 2, folder), Head()
        (metrics,) = trainer.validate(module, loader(2), verbose=False)
        predictions = trainer.predict(module, loader(2), return_predictions=True)
        found.append((metrics, torch.cat(predictions)))
    module = Head(torch.float32)
    module.cpu = None  # nobody calls it
    trainer = trainer_of("zerolite_stage_2_offload", 2, folder)
    trainer.fit(module, loader(2, torch.float32))
    before = parameters_of(module.net, module)
    trainer.save_checkpoint(f"{folder}/whole", weights_only=True)
    with zerolite.full_params(module, writeback=True), torch.no_grad():
        module.net.first.weight.zero_()
    trainer.validate(module, loader(2, torch.float32), verbose=False, ckpt_path=f"{folder}/whole")
    assert largest_difference(before, parameters_of(module.net, module)) == 0.0
    trainer_of("zerolite_stage_2_offload", 2, folder).fit(module, loader(2, torch.float32))
    moved = largest_difference(before, parameters_of(module.net, module))
    return [*found, moved, str(module.device)]


def test_modules_are_evaluated_without_and_after_training_and_train_again(ranks, tmp_path):
    (expected, found, moved, device), _ = ranks(2).run(evaluation_on_rank, str(tmp_path))
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    assert moved > 0 and device == "cpu"


def with_two_optimizers(module: Module) -> list:
    return [optimizer_of(module.net.first), optimizer_of(module.net.blocks)]


def with_sgd(module: Module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def with_an_object(folder: str) -> None:
    module = Module()
    module.on_save_checkpoint = lambda checkpoint: checkpoint.update(mine=Run())
    fit("zerolite", 1, folder, module=module, save=f"{folder}/object")


def fit_refused(folder: str, strategy="zerolite_stage_3", **options) -> None:
    trainer_options = {key: value for key, value in options.items() if key not in ("configure", "load", "save")}
    module = Module()
    if "configure" in options:
        module.automatic_optimization = options["configure"] is not with_two_optimizers
        module.configure_optimizers = lambda: options["configure"](module)
    fit(strategy, 1, folder, module=module, load=options.get("load"), save=options.get("save"), **trainer_options)


def of_a_file(folder: str) -> None:
    fit("ddp", 1, folder, save=f"{folder}/plain.ckpt", max_steps=1)
    fit_refused(folder, load=f"{folder}/plain.ckpt")


def of_zerolite_alone(folder: str) -> None:
    model = zerolite.shard(Module(), stage=3)
    zerolite.save(model, f"{folder}/bare", zerolite.like(optimizer_of(model)))
    fit_refused(folder, load=f"{folder}/bare")


def sharded_otherwise(folder: str) -> None:
    module = Module()
    for name in ("zerolite_stage_1", "zerolite_stage_3"):
        fit(name, 1, folder, module=module)


HALF = zerolite.Precision(torch.float16)
REFUSED = {
    "two optimizers": (
        lambda at: fit_refused(at, configure=with_two_optimizers, gradient_clip_val=None, accumulate_grad_batches=1),
        "2 optimizers",
    ),
    "SGD": (lambda at: fit_refused(at, configure=with_sgd), "got torch.optim.sgd.SGD"),
    "an average": (lambda at: fit_refused(at, callbacks=[StochasticWeightAveraging(0.1)]), "StochasticWeightAveraging"),
    "clipping by value": (lambda at: fit_refused(at, gradient_clip_algorithm="value"), "clip_grad_norm_"),
    "loss scaled twice": (
        lambda at: fit_refused(at, ZeroStrategy(3, precision=HALF), plugins=[fp16()]),
        "Precision(torch.float16)",
    ),
    "another stage": (sharded_otherwise, "build it anew"),
    "a file of another strategy": (of_a_file, "is a file"),
    "a checkpoint without Lightning's state": (of_zerolite_alone, "outside of Lightning"),
    "a value that is not read again": (with_an_object, "'mine' could be written"),
    "a remote folder": (lambda at: fit_refused(at, save="s3://bucket/step"), "local folders"),
    "a stage that is none": (lambda at: ZeroStrategy(4), "stage is 0, 1, 2 or 3"),
    "an option of DDP": (lambda at: ZeroStrategy(3, find_unused_parameters=True), "find_unused_parameters"),
    "a CheckpointIO": (
        lambda at: fit_refused(at, plugins=[pl.plugins.io.AsyncCheckpointIO()]),
        "AsyncCheckpointIO",
    ),
}


def refusals_on_rank(folder: str) -> dict[str, str]:
    texts = {}
    for name, (work, _) in REFUSED.items():
        try:
            work(folder)
        except (TypeError, ValueError, zerolite.ZeroliteError) as error:
            texts[name] = str(error)
    return texts


def test_what_cannot_be_is_refused_by_name(ranks, tmp_path):
    (texts,) = ranks(1).run(refusals_on_rank, str(tmp_path))
    for name, (_, expected) in REFUSED.items():
        assert expected in texts.get(name, ""), name


def test_strategies_are_registered_by_name():
    names = {name for name in StrategyRegistry.available_strategies() if name.startswith("zerolite")}
    assert names == {
        "zerolite", *(f"zerolite_stage_{stage}" for stage in range(4)),
        *(f"zerolite_stage_{stage}_offload" for stage in range(1, 4)),
    }  # fmt: skip
    assert StrategyRegistry.get("zerolite_stage_3_offload")._sharding["offload"] == "cpu"


def test_the_methods_of_lightning_that_are_overridden_are_there():
    """This test names what a release has dropped."""
    own = {name for name in vars(ZeroStrategy) if not name.startswith("_")}
    assert not own - set(dir(DDPStrategy))
    source = inspect.getsource(DDPStrategy) + inspect.getsource(DDPStrategy.__mro__[1]) + inspect.getsource(pl.Trainer)
    assert not [name for name in integration.PRIVATE if name not in source]
