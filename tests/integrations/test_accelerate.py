"""Does a script with Accelerate's loop train, log, save and go on with `zero=` as it does on DDP?"""

from __future__ import annotations

import inspect
import json

import accelerate
import pytest
import torch
from accelerate.utils import GradientAccumulationPlugin
from accelerate_runs import Run, accelerator_of, train
from models import llama
from safetensors.torch import load_file
from trainer_tasks import build, largest_difference, optimizer_of

import zerolite
from zerolite.integrations import accelerate as integration
from zerolite.integrations.sharding import shard_on

ULPS = 1e-14  # norms are summed in another order than torch's, and may differ in their last bit


def assert_same_run(run: Run, expected: Run, skipped: int = 0) -> None:
    """skipped: how many batches another run had trained before."""
    assert run.losses == pytest.approx(expected.losses[skipped:], abs=ULPS, rel=0)
    assert run.norms == pytest.approx(expected.norms[skipped // 2 :], rel=ULPS)
    assert run.rates == expected.rates[skipped // 2 :]
    assert run.syncs == [False, True] * (len(run.losses) // 2)
    if not skipped:
        assert run.evaluations == pytest.approx(expected.evaluations, abs=ULPS, rel=0)
    assert largest_difference(run.parameters, expected.parameters) < 1e-12


def stages_on_rank(stages: list[int], folder: str) -> tuple[Run, dict[str, Run], list[float]]:
    expected = train(None)
    runs = {f"stage {stage}": train({"stage": stage}) for stage in stages}
    train({"stage": 1}, save_at=(1, folder))
    runs["resumed at stage 3"] = train({"stage": 3}, load=(1, folder))
    bits = [train(zero, dtype=torch.float32) for zero in ({"stage": 3}, {"stage": 3, "offload": "cpu"})]
    return expected, runs, [largest_difference(*(run.parameters for run in bits))]


def check_stages(ranks, world: int, stages: list[int], tmp_path) -> None:
    for rank, (expected, runs, bits) in enumerate(ranks(world).run(stages_on_rank, stages, str(tmp_path / "state"))):
        if rank > 0:
            expected.parameters = {}  # whole on the main process alone
        for name, run in runs.items():
            if rank > 0:
                assert not run.parameters
            assert_same_run(run, expected, 2 if name.startswith("resumed") else 0)
        assert bits == [0.0]


@pytest.mark.parametrize(("world", "stages"), [(1, [2]), (2, [1, 3])])
def test_a_script_trains_as_on_ddp_and_goes_on_at_another_stage(ranks, tmp_path, world, stages):
    """Accumulation, clipping, a schedule, uneven labels and evaluation in between; the resumed half, too."""
    check_stages(ranks, world, stages, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_all_stages_train_as_on_ddp(ranks, tmp_path, world):
    check_stages(ranks, world, [0, 1, 2, 3], tmp_path)


def use_fp16(accelerator: accelerate.Accelerator) -> None:
    """What Accelerate does for mixed_precision="fp16" on a GPU."""
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**10)


def precisions_on_rank() -> list[tuple[Run, Run]]:
    ways = [{"mixed_precision": "bf16"}, {"mixed_precision": "fp16", "prepared_by": use_fp16}]
    ways += [{"gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)}]
    pairs = []
    for options in ways:
        pairs.append([train(zero, dtype=torch.float32, **options) for zero in ({"stage": 2}, None)])
    return pairs


def test_autocast_scaling_and_synced_accumulation_are_those_of_ddp(ranks):
    for run, expected in ranks(2).run(precisions_on_rank)[0]:
        assert run.losses == pytest.approx(expected.losses, abs=1e-6)
        assert run.norms == pytest.approx(expected.norms, rel=1e-5)
        assert largest_difference(run.parameters, expected.parameters) < 1e-6


def compiled_on_rank() -> tuple[Run, Run]:
    return train(None), train({"stage": 3}, wrap=lambda model: torch.compile(model, backend="eager"))


@pytest.mark.slow
def test_a_model_that_torch_has_compiled_before_is_sharded_inside(ranks):
    expected, run = ranks(2).run(compiled_on_rank)[0]
    assert_same_run(run, expected)


def files_on_rank(folder: str) -> tuple[dict, list, list[float]]:
    """The state dict of a tied model, what hooks of a user's were given, and a value before and after load_state."""
    accelerator = accelerator_of({"stage": 3})
    model = accelerator.prepare(llama(tied=True))
    accelerator.save_model(model, f"{folder}/model")
    state = accelerator.get_state_dict(model)
    assert len({value.data_ptr() for value in state.values()}) == max(0, len(state) - 1), "tied values lie once"
    given = []
    hook = accelerator.register_save_state_pre_hook(lambda *arguments: given.append([len(a) for a in arguments[:2]]))
    accelerator.save_state(f"{folder}/state")
    hook.remove()
    values = []
    for is_loaded_by_hook in (True, False):
        with zerolite.full_params(model, writeback=True), torch.no_grad():
            model.model.norm.weight.fill_(7.0)
        if is_loaded_by_hook:
            hook = accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        accelerator.load_state(f"{folder}/state")
        hook.remove()
        with zerolite.full_params(model):
            values.append(model.model.norm.weight[0].item())
    return state, given, values


def test_whole_weights_are_written_once_and_hooks_of_a_user_count(ranks, tmp_path):
    (state, given, values), (elsewhere, _, _) = ranks(2).run(files_on_rank, str(tmp_path))
    plain = llama(tied=True)
    assert list(state) == list(plain.state_dict()) and not elsewhere
    plain.load_state_dict(state)
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(state[name], written[name]) for name in written)
    assert len(written) == len(state) - 1  # tied once
    assert given == [[1, 1]] and values == [7.0, 1.0]
    assert json.loads((tmp_path / "state" / "zerolite" / "manifest.json").read_text())["world_size"] == 2


def several_on_rank() -> list:
    """Two models, each with its optimizer and scheduler; the gradient of one holds Inf."""
    accelerator = accelerator_of({"stage": 1}, gradient_accumulation_steps=1)
    models = [build(), build()]
    optimizers = [optimizer_of(model) for model in models]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in optimizers]
    models[0], models[1], *rest = accelerator.prepare(*models, *optimizers, *schedulers)
    teacher = accelerator.prepare_model(build(), evaluation_mode=True)
    for factor, model, optimizer, scheduler in zip((torch.inf, 1.0), models, rest[:2], rest[2:], strict=True):
        accelerator.backward(model(torch.ones(2, 5, dtype=torch.float64)).sum() * factor)
        optimizer.step()
        scheduler.step()
    rates = [scheduler.get_last_lr()[0] for scheduler in rest[2:]]
    return [rates, [optimizer.step_was_skipped for optimizer in rest[:2]], hasattr(teacher, "_zerolite")]


@pytest.mark.filterwarnings("ignore:step skipped")
def test_a_scheduler_waits_for_its_own_optimizer(ranks):
    """That of the other model goes on. A model that is prepared for evaluation is not sharded."""
    (result,) = ranks(1).run(several_on_rank)
    assert result == [[0.05, pytest.approx(0.005)], [True, False], False]


def plain_sharded(accelerator, stage: int) -> None:
    accelerator.prepare(zerolite.shard(build(), stage=stage))


def without_its_model(accelerator) -> None:
    accelerator.prepare(optimizer_of(build()))


def second_optimizer(accelerator) -> None:
    model = build()
    accelerator.prepare(model, optimizer_of(model), torch.optim.AdamW(model.first.parameters()))


def sgd(accelerator) -> None:
    model = build()
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def sharded_otherwise(accelerator) -> None:
    accelerator.prepare(zerolite.shard(build(), stage=2))


def scaled_twice(accelerator) -> None:
    use_fp16(accelerator)
    accelerator.prepare(build())


def clipped_by_value(accelerator) -> None:
    model = accelerator.prepare(build())
    model(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    accelerator.clip_grad_value_(model.parameters(), 1.0)


def on_another_device(accelerator) -> None:
    shard_on(zerolite.shard(build(), stage=3), torch.device("meta"), 1, SHARDS)


def joined(accelerator) -> None:
    with accelerator.join_uneven_inputs([accelerator.prepare(build())]):
        pass


def missing_state(accelerator) -> None:
    accelerator.prepare(build())
    accelerator.load_state("/")


SHARDS = {"stage": 3}
REFUSED = {
    "a plain Accelerator, stage 1": (None, {}, lambda a: plain_sharded(a, 1), "zerolite.integrations.accelerate"),
    "a plain Accelerator, stage 3": (None, {}, lambda a: plain_sharded(a, 3), "zerolite.integrations.accelerate"),
    "fsdp": (SHARDS, {"fsdp_plugin": accelerate.FullyShardedDataParallelPlugin}, None, "fsdp_plugin="),
    "a parallelism": (SHARDS, {"parallelism_config": accelerate.ParallelismConfig}, None, "parallelism_config="),
    "an unknown key": ({"stage": 3, "offlaod": "cpu"}, {}, None, "offlaod"),
    "no stage": ({"offload": "cpu"}, {}, None, "takes stage"),
    "no mapping": (3, {}, None, "dict"),
    "a stage that is none": ({"stage": 4}, {}, None, "stage is 0, 1, 2 or 3"),
    "an optimizer without its model": (SHARDS, {}, without_its_model, "give prepare the model"),
    "a second optimizer": (SHARDS, {}, second_optimizer, "second optimizer"),
    "SGD": (SHARDS, {}, sgd, "got torch.optim.sgd.SGD"),
    "another stage": (SHARDS, {}, sharded_otherwise, "build it anew"),
    "loss scaled twice": ({"stage": 3, "precision": zerolite.Precision(torch.float16)}, {}, scaled_twice, "again"),
    "clipping by value": (SHARDS, {}, clipped_by_value, "clip_grad_norm_"),
    "another device": (SHARDS, {}, on_another_device, "moves batches to meta"),
    "uneven batches": (SHARDS, {}, joined, "join_uneven_inputs"),
    "a folder without a checkpoint": (SHARDS, {}, missing_state, "zerolite"),
}


def refusals_on_rank() -> dict[str, str]:
    texts = {}
    for name, (zero, options, work, _) in REFUSED.items():
        try:
            accelerator = accelerator_of(zero, **{key: make() for key, make in options.items()})
            if work is not None:
                work(accelerator)
        except (TypeError, ValueError, zerolite.ZeroliteError) as error:
            texts[name] = str(error)
    return texts


def test_what_cannot_be_is_refused_by_name(ranks):
    (texts,) = ranks(1).run(refusals_on_rank)
    for name, (*_, expected) in REFUSED.items():
        assert expected in texts.get(name, ""), name


def uncounted_on_rank() -> str:
    with pytest.raises(ValueError) as refusal:
        accelerator_of({"stage": 3}, cpu=False).prepare(build())
    return str(refusal.value)


def test_ranks_that_accelerate_does_not_count_are_refused(ranks):
    """On CPUs it divides no batches unless it is told cpu=True."""
    for text in ranks(2).run(uncounted_on_rank):
        assert "counts 1 processes and torch.distributed 2" in text


def test_the_private_names_of_accelerate_are_there():
    """What is overridden or set by zerolite.integrations.accelerate: this test names what a release has dropped."""
    source = inspect.getsource(accelerate.Accelerator)
    assert not [name for name in integration.PRIVATE if name not in source]
    own = {name for name in vars(integration.Accelerator) if not name.startswith("_")}
    assert not own - set(dir(accelerate.Accelerator))
    given = inspect.signature(accelerate.Accelerator.prepare_model).parameters
    assert {"device_placement", "evaluation_mode"} <= given.keys()
