"""Does a loop on Lightning Fabric train, clip, save and go on with `strategy="zerolite..."` as it does on DDP?"""

from __future__ import annotations

import inspect

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.strategies import STRATEGY_REGISTRY, DDPStrategy
from lightning_runs import Module, Run, fabric_loop
from models import Stack
from trainer_tasks import build, largest_difference, optimizer_of

import zerolite
from zerolite.integrations import fabric as integration
from zerolite.integrations.fabric import FabricZeroStrategy

ULPS = 1e-14  # norms are summed in another order than torch's, and may differ in their last bit


def assert_same_run(run: Run, expected: Run, skipped: int = 0) -> None:
    """skipped: how many batches another run had trained before."""
    assert run.losses == pytest.approx(expected.losses[skipped:], abs=ULPS, rel=0) and run.losses
    assert run.norms == pytest.approx(expected.norms[skipped // 2 :], rel=ULPS)
    assert run.rates == expected.rates[skipped // 2 :]
    assert run.syncs == [False, True] * (len(run.losses) // 2)
    assert largest_difference(run.parameters, expected.parameters) < 1e-12


def stages_on_rank(world: int, stages: list[int], folder: str) -> tuple[Run, list[tuple[Run, int]], list[float]]:
    """DDP's run, (a run, how many batches were behind it), and how far offload is from none."""
    expected = fabric_loop("ddp", world)
    runs = [(fabric_loop(f"zerolite_stage_{stage}", world), 0) for stage in stages]
    fabric_loop("zerolite_stage_1", world, save=(1, folder))
    runs.append((fabric_loop("zerolite_stage_3", world, load=folder), 2))
    bits = [fabric_loop(name, world, dtype=torch.float32) for name in ("zerolite", "zerolite_stage_2_offload")]
    return expected, runs, [largest_difference(*(run.parameters for run in bits))]


def check_stages(ranks, world: int, stages: list[int], folder: str) -> None:
    for expected, runs, bits in ranks(world).run(stages_on_rank, world, stages, folder):
        for run, skipped in runs:
            assert_same_run(run, expected, skipped)
        assert bits == [0.0]


@pytest.mark.parametrize(("world", "stages"), [(1, [3]), (2, [0, 2])])
def test_a_loop_trains_as_on_ddp_and_goes_on_at_another_stage(ranks, tmp_path, world, stages):
    """The optimizer and its scheduler are built before `setup`; the resumed part, too."""
    check_stages(ranks, world, stages, str(tmp_path / "state"))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_all_stages_train_as_on_ddp(ranks, tmp_path, world):
    check_stages(ranks, world, [0, 1, 2, 3], str(tmp_path / "state"))


def fp16() -> MixedPrecision:
    """What Fabric takes for "16-mixed" on a GPU; on a CPU it would take bf16."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


def precisions_on_rank() -> list[list[Run]]:
    ways = [lambda: {"precision": "bf16-mixed"}, lambda: {"plugins": [fp16()]}]
    return [[fabric_loop(name, 2, dtype=torch.float32, **way()) for name in ("zerolite", "ddp")] for way in ways]


def test_autocast_and_scaling_are_those_of_ddp(ranks):
    for run, expected in ranks(2).run(precisions_on_rank)[0]:
        assert run.losses == pytest.approx(expected.losses, abs=1e-6)
        assert run.norms == pytest.approx(expected.norms, rel=1e-5)
        assert largest_difference(run.parameters, expected.parameters) < 1e-6


def launched(strategy="zerolite_stage_3", **options) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy, **options)
    fabric.launch()
    return fabric


def steps_on_rank() -> list[str]:
    """The dtype that a LightningModule's training_step computes in under autocast."""
    fabric, seen = launched(precision="bf16-mixed"), []
    module = Module(torch.float32)
    module.net.register_forward_hook(lambda module, args, output: seen.append(str(output.dtype)))
    model = fabric.setup_module(module)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.1))
    loss = model.training_step((torch.ones(2, 5), torch.tensor([0, 1])), 0)
    fabric.backward(loss)
    optimizer.step()
    return seen


def test_steps_of_a_module_run_under_autocast_and_the_optimizer_may_come_later(ranks):
    (seen,) = ranks(1).run(steps_on_rank)
    assert seen == ["torch.bfloat16"]


def raw_on_rank(folder: str) -> float:
    """Fabric.load_raw of a plain state dict at stage 3; a module built on the meta device, with values from it."""
    plain = build()
    torch.save(plain.state_dict(), f"{folder}/raw.pt")
    fabric = launched()
    with fabric.init_module(empty_init=True):
        module = Stack(blocks=2).double()
    model = fabric.setup(module)
    fabric.load_raw(f"{folder}/raw.pt", model)
    with zerolite.full_params(module):
        return largest_difference(dict(module.state_dict()), dict(plain.state_dict()))


def test_a_plain_state_dict_is_loaded_into_shards(ranks, tmp_path):
    assert ranks(1).run(raw_on_rank, str(tmp_path)) == [0.0]


def two_modules(fabric: Fabric) -> None:
    fabric.save("nowhere", {"one": fabric.setup(build()), "two": fabric.setup(build())})


def with_a_filter(fabric: Fabric) -> None:
    fabric.save("nowhere", {"model": fabric.setup(build())}, filter={"model": lambda name, value: True})


def without_its_module(fabric: Fabric) -> None:
    fabric.setup_optimizers(optimizer_of(build()))


def clipped_by_value(fabric: Fabric) -> None:
    module = build()
    model, optimizer = fabric.setup(module, optimizer_of(module))
    fabric.backward(model(torch.ones(2, 5, dtype=torch.float64)).sum())
    fabric.clip_gradients(model, optimizer, clip_val=1.0)


def loaded_without_state(fabric: Fabric) -> None:
    fabric.load("nowhere")


REFUSED = {
    "two modules in a checkpoint": (two_modules, "got 2 and 0"),
    "a filter": (with_a_filter, "filter"),
    "an optimizer without its module": (without_its_module, "set its module up"),
    "clipping by value": (clipped_by_value, "clip_grad_norm_"),
    "a load of everything": (loaded_without_state, "state={...}"),
    "an option of DDP": (lambda fabric: FabricZeroStrategy(3, static_graph=True), "static_graph"),
}


def refusals_on_rank() -> dict[str, str]:
    texts = {}
    for name, (work, _) in REFUSED.items():
        try:
            work(launched())
        except (TypeError, ValueError, zerolite.ZeroliteError) as error:
            texts[name] = str(error)
    return texts


def test_what_cannot_be_is_refused_by_name(ranks):
    (texts,) = ranks(1).run(refusals_on_rank)
    for name, (_, expected) in REFUSED.items():
        assert expected in texts.get(name, ""), name


def test_the_methods_of_fabric_that_are_overridden_are_there():
    """This test names what a release has dropped."""
    own = {name for name in vars(FabricZeroStrategy) if not name.startswith("_")}
    assert not own - set(dir(DDPStrategy))
    assert not [name for name in integration.PRIVATE if name not in inspect.getsource(Fabric)]
    assert STRATEGY_REGISTRY.get("zerolite_stage_3")._sharding == {
        "stage": 3, "offload": None, "precision": None, "units": None,
    }  # fmt: skip
