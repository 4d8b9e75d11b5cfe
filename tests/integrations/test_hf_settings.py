"""What may a sharded trainer be told, and is the rest refused by name before anything is trained?"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import trl
from models import assert_close, whole
from trainer_runs import EVAL_ROWS, ROWS, mean_loss, model_of, options_of, result_of, rows_of, train, trainer_of
from transformers import Trainer, TrainingArguments

import zerolite
from zerolite.engine.engine import engine_of
from zerolite.integrations import transformers as integration
from zerolite.integrations.transformers import ZeroTrainer, from_deepspeed


@pytest.mark.parametrize("owner", [Trainer, trl.DPOTrainer])
def test_the_private_methods_that_are_overridden_are_still_there(owner):
    """A release that drops or renames one would pass the mixin over in silence: it is named here."""
    names = integration.PRIVATE[owner.__module__.split(".")[0]]
    gone = [name for name in names if not callable(getattr(owner, name, None))]
    assert not gone, f"{owner.__module__}.{owner.__name__} has no {gone} any more"


def test_a_trainer_without_them_is_refused(monkeypatch):
    monkeypatch.delattr(Trainer, "_get_grad_norm")
    with pytest.raises(ImportError, match="has no _get_grad_norm, which zerolite overrides"):
        ZeroTrainer(model=model_of("trainer"), zero=dict(stage=1))


def test_the_mixin_overrides_no_other_private_method():
    ours = {name for name in vars(integration.ZeroMixin) if name.startswith("_") and not name.startswith("__")}
    foreign = {name for name in ours if hasattr(trl.DPOTrainer, name)}
    assert foreign <= {name for names in integration.PRIVATE.values() for name in names}


def refused(zero, folder, *, model=None, options=None, **given) -> str:
    with pytest.raises((ValueError, TypeError)) as error:
        trainer_of("trainer", Path(folder), zero, model=model, options=options, **given).train()
    return str(error.value)


def test_settings_that_cannot_be_are_refused_by_name(tmp_path, monkeypatch):
    said = partial(refused, folder=tmp_path)
    assert "takes a dict" in said(3)
    assert "needs a stage" in said(dict(offload="cpu"))
    assert "does not know stages" in said(dict(stage=1, stages=2))
    assert "stage is 0, 1, 2 or 3" in said(dict(stage=4))
    assert "streams what stage 3 shards" in said(dict(stage=1, offload=zerolite.Offload(parameters=True)))
    assert "is one of AdamW, Adam, Lamb, Lion" in said(dict(stage=1, optimizer="Adafactor"))
    assert "adamw_torch, adamw_torch_fused, lion_32bit" in said(dict(stage=1), optim="adafactor")
    assert "torch.bfloat16" in said(dict(stage=1, precision=zerolite.Precision(torch.float16)), bf16=True)
    for name in ("save_on_each_node", "bf16_full_eval", "fp16_full_eval"):
        assert f"TrainingArguments({name}=...)" in said(dict(stage=1), **{name: True})
    with pytest.raises(ValueError, match=r"zero=dict\(stage=...\), or a model that zerolite has sharded"):
        ZeroTrainer(model=model_of("trainer"), args=TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match=r"give zero=dict\(stage=...\)"):
        ZeroTrainer(model_init=lambda: model_of("trainer"), args=TrainingArguments(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize(("name", "value"), [("deepspeed", {"zero_optimization": {"stage": 2}}), ("fsdp", True)])
def test_another_way_to_shard_is_refused_beside_zero(tmp_path, name, value):
    """The arguments themselves need these libraries, so it is set afterwards."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    setattr(arguments, name, value)
    with pytest.raises(ValueError, match=f"TrainingArguments\\({name}="):
        ZeroTrainer(model=model_of("trainer"), args=arguments, zero=dict(stage=2))


def sharded_before(folder: str) -> list[object]:
    """A model that is sharded already; the same with zero=; arguments that need one process, or whole parameters."""
    expected = train("trainer", Path(folder) / "zero", dict(stage=2))
    model = zerolite.shard(model_of("trainer"), stage=2)
    actual = train("trainer", Path(folder) / "sharded", None, model=model)
    errors = [
        refused(dict(stage=2), folder, model=model),
        refused(dict(stage=1), folder, auto_find_batch_size=True),
        refused(None, folder, model=zerolite.shard(model_of("trainer", torch.float32), stage=1), fp16=True),
    ]
    return [expected, actual, errors]


def of_one_process_each(folder: str) -> str:
    """Without use_cpu, and without a GPU, Accelerate takes each of torchrun's ranks for a process of its own."""
    return refused(dict(stage=1), folder, use_cpu=False)


def test_ranks_that_the_trainer_does_not_see_are_named(ranks, tmp_path):
    for said in ranks(2).run(of_one_process_each, str(tmp_path)):
        assert "sharded over 2 ranks, and the trainer sees 1" in said and "use_cpu=True" in said


def test_a_model_may_be_sharded_before_the_trainer_has_it(ranks, tmp_path):
    for expected, actual, errors in ranks(2).run(sharded_before, str(tmp_path)):
        assert actual.logs == expected.logs
        assert_close(actual.parameters, expected.parameters, rtol=0)
        assert "sharded already: drop zero=" in errors[0]
        assert "auto_find_batch_size" in errors[1] and "leave the others waiting" in errors[1]
        assert "fp16=True, and the model's precision is None" in errors[2]


def by_optimizers(folder: str) -> list[tuple[str, object, object]]:
    """Optimizers and models that users bring."""

    def torch_adamw(model, **options):
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0, **options)

    def run(name: str, zero, build=None, **options):
        model = model_of("trainer")
        if build is not None:
            options["optimizers"] = (build(model), None)
        return name, train("trainer", Path(folder), zero, model=model, options=options)

    def runs(zero, adam: type) -> list:
        return [
            run("built before", zero, torch_adamw),
            run("by class", zero, optimizer_cls_and_kwargs=(adam, {"lr": 0.01, "weight_decay": 0.1})),
            run("by model_init", zero, model_init=lambda: model_of("trainer")),
        ]

    pairs = zip(runs(None, torch.optim.Adam), runs(dict(stage=3), zerolite.Adam), strict=True)
    return [(name, one, other) for (name, one), (_, other) in pairs]


def test_optimizers_and_models_that_users_bring_work(ranks, tmp_path):
    for results in ranks(2).run(by_optimizers, str(tmp_path)):
        for name, expected, actual in results:
            assert [row.get("loss") for row in actual.logs] == [row.get("loss") for row in expected.logs], name
            assert_close(actual.parameters, expected.parameters, rtol=1e-12, atol=1e-13)


def lion(folder: str):
    trainer = trainer_of("trainer", Path(folder), dict(stage=2), optim="lion_32bit", adam_beta1=0.8)
    trainer.train()
    return type(trainer.optimizer).__name__, trainer.optimizer.param_groups[0]["betas"]


def test_lion_has_the_rates_of_the_arguments(ranks, tmp_path):
    for name, betas in ranks(1).run(lion, str(tmp_path)):
        assert name == "Lion" and betas == (0.8, 0.999)


def of_sixteen_bits(folder: str) -> list[tuple[list[dict], torch.dtype, bool, object]]:
    """Log, dtype, whether Accelerate's autocast is on, and its scaler: fp32, fp16, overflowing fp16, bf16."""
    small, large = (torch.amp.GradScaler("cpu", init_scale=2.0**power) for power in (7, 26))
    results = []
    for zero, given in [
        ({}, {}),
        (dict(precision=zerolite.Precision(torch.float16, scaler=small)), dict(fp16=True)),
        (dict(precision=zerolite.Precision(torch.float16, scaler=large)), dict(fp16=True)),
        (dict(precision=zerolite.Precision(torch.bfloat16)), dict(bf16=True)),
    ]:
        model = model_of("trainer", torch.float32)
        trainer = trainer_of("trainer", Path(folder), dict(stage=2, **zero), model=model, **given)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        dtype = next(trainer.model.parameters()).dtype
        results.append((rows, dtype, trainer.accelerator.native_amp, trainer.accelerator.scaler))
    return results


def test_sixteen_bits_are_the_parameters_own_and_need_no_scaler_or_autocast(ranks, tmp_path):
    for (expected, *_), *others in ranks(2).run(of_sixteen_bits, str(tmp_path)):
        dtypes = [torch.float16, torch.float16, torch.bfloat16]
        for (_, dtype, autocasts, scaler), wanted in zip(others, dtypes, strict=True):
            assert dtype == wanted and not autocasts and scaler is None
        losses = [row["loss"] for row in expected]
        for rows in (others[0][0], others[2][0]):
            assert [row["loss"] for row in rows] == pytest.approx(losses, rel=0.05)
            assert [row["loss"] for row in rows] != losses
        overflowed = others[1][0]
        assert not torch.tensor([row["grad_norm"] for row in overflowed]).isfinite().any()
        assert all(row["learning_rate"] == 0 for row in overflowed), "a step that is skipped is none of the schedule"


def fp16_by_arguments(folder: str) -> list[tuple[torch.dtype, torch.dtype, float, bool]]:
    """By the argument alone, and by a DeepSpeed configuration: dtypes, loss scale, whether states leave the device."""
    config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "gradient_clipping": "auto",
        "fp16": {"enabled": True, "initial_scale_power": 8},
    }  # fmt: skip
    results = []
    for zero in (dict(stage=1), from_deepspeed(config)):
        trainer = trainer_of("trainer", Path(folder), zero, model=model_of("trainer", torch.float32), fp16=True)
        engine = engine_of(trainer._wrap_model(trainer.model))
        offloads = any(bucket.shard.steps_in_background for unit in engine.units for bucket in unit.buckets)
        results.append((engine.precision.param, engine.precision.reduce, engine.loss_scale.value, offloads))
    return results


def test_fp16_is_a_precision_with_a_loss_scale(ranks, tmp_path):
    for by_argument, by_deepspeed in ranks(1).run(fp16_by_arguments, str(tmp_path)):
        assert by_argument == (torch.float16, torch.float32, 65536.0, False)
        assert by_deepspeed == (torch.float16, torch.float16, 256.0, True)


def reductions(folder: str) -> list[list[bool]]:
    """Of each batch of a step, whether its gradients are reduced: by default, and told to reduce every batch."""
    return [reductions_of_step(folder, plugin) for plugin in ({}, {"sync_each_batch": True})]


def reductions_of_step(folder: str, plugin: dict) -> list[bool]:
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(engine_of(trainer.model).is_syncing)
        return mean_loss(outputs, labels, num_items_in_batch)

    given = dict(max_steps=1, eval_strategy="no", accelerator_config={"gradient_accumulation_kwargs": plugin})
    trainer = trainer_of("trainer", Path(folder), dict(stage=2), options=dict(compute_loss_func=loss), **given)
    trainer.train()
    return seen


def test_gradients_are_reduced_once_a_step_unless_told(ranks, tmp_path):
    assert ranks(2).run(reductions, str(tmp_path)) == [[[False, True], [True, True]]] * 2


def out_of_memory(folder: str) -> list[object]:
    """The first backward of the first size runs out of memory, half of the way."""

    def loss(outputs, labels, num_items_in_batch=None):
        def fail(gradient):
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

        if len(labels) > 2:
            outputs.hidden_states[1].register_hook(fail)
        return mean_loss(outputs, labels, num_items_in_batch)

    results = []
    for zero in (None, dict(stage=2), dict(stage=3)):
        model = model_of("trainer")
        model.config.output_hidden_states = True
        options = dict(compute_loss_func=loss)
        given = dict(auto_find_batch_size=True, per_device_train_batch_size=4, eval_strategy="no")
        trainer = trainer_of("trainer", Path(folder), zero, model=model, options=options, **given)
        trainer.train()
        results.append((trainer._train_batch_size, result_of(trainer)))
    return results


def test_a_batch_size_is_found_on_one_process(ranks, tmp_path):
    for (size, expected), *others in ranks(1).run(out_of_memory, str(tmp_path)):
        assert size < 4
        for other_size, actual in others:
            assert other_size == size and [row.get("loss") for row in actual.logs] == [
                row.get("loss") for row in expected.logs
            ]
            assert_close(actual.parameters, expected.parameters, rtol=1e-12, atol=1e-13)


def shards_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [bucket.shard.values() for unit in engine_of(model).units for bucket in unit.buckets]


def by_a_plain_trainer(stage: int, folder: str) -> list[object]:
    """A sharded model in transformers' own Trainer: with torch's optimizer, with zerolite's; DDP's run beside it."""
    given = dict(weight_decay=0.0)
    expected = train("trainer", Path(folder), None, **given)
    outcomes: list[object] = []
    for brings in (False, True):
        model = zerolite.shard(model_of("trainer"), stage=stage)
        before = [values.clone() for values in shards_of(model)]
        optimizer = zerolite.AdamW(model.parameters(), lr=0.01, weight_decay=0.0) if brings else None
        try:
            plain = trainer_of("trainer", Path(folder), None, **given)  # its arguments
            trainer = Trainer(
                model=model, args=plain.args, train_dataset=rows_of("trainer", ROWS, 11),
                eval_dataset=rows_of("trainer", EVAL_ROWS, 12), **options_of("trainer"), optimizers=(optimizer, None),
            )  # fmt: skip
            trainer.train()
            with zerolite.full_params(model):
                outcomes.append(whole(model))
        except zerolite.ZeroliteError as error:
            assert all(map(torch.equal, shards_of(model), before)), "something was trained"
            outcomes.append(str(error))
    return [expected, *outcomes]


@pytest.mark.parametrize(("world", "stage"), [(1, 3), (2, 1), (2, 3)])
def test_a_plain_trainer_trains_a_sharded_model_as_ddp_or_names_what_it_cannot(ranks, tmp_path, world, stage):
    for expected, error, outcome in ranks(world).run(by_a_plain_trainer, stage, str(tmp_path)):
        assert isinstance(error, str) and "zerolite" in error
        if isinstance(outcome, str):
            assert "DistributedDataParallel" in outcome
        else:
            assert_close(outcome, expected.parameters, rtol=1e-12, atol=1e-13)


def reference(folder: str) -> tuple[int, bool, bool]:
    """DPO's reference model: its stage, whether any of it is trained, whether any is whole."""
    trainer = trainer_of("dpo", Path(folder), dict(stage=3, offload="cpu"))
    engine = engine_of(trainer.ref_model)
    is_trained = any(parameter.requires_grad for parameter in trainer.ref_model.parameters())
    return (
        engine.partition.stage,
        is_trained,
        any(bucket.parameters.is_readable for unit in engine.units for bucket in unit.buckets),
    )


def test_a_reference_model_is_frozen_and_sharded_as_the_model_is(ranks, tmp_path):
    assert ranks(2).run(reference, str(tmp_path)) == [(3, False, False)] * 2


def ends_of_generation(folder: str) -> list[list[int]]:
    """Lengths that this rank's rows are generated to: they differ, and ranks gather as often as each other."""
    trainer = trainer_of("seq2seq", Path(folder), dict(stage=3), model=model_of("seq2seq", torch.float32))
    model = trainer._wrap_model(trainer.model)
    rank = dist.get_rank()
    model.generation_config.max_new_tokens = 2 + 5 * rank
    rows = torch.full((1, 4), 5 + rank)
    return model.generate(input_ids=rows, synced_gpus=False).tolist()


def test_ranks_that_finish_generating_early_wait_for_the_others(ranks, tmp_path):
    first, second = ranks(2).run(ends_of_generation, str(tmp_path))
    assert len(first[0]) < len(second[0])


def test_from_deepspeed_is_what_zero_takes(tmp_path):
    config = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "optimizer": {"type": "Adam"}}
    trainer = trainer_of("trainer", tmp_path, from_deepspeed(config))
    settings = trainer._shard_settings
    assert settings.optimizer == "AdamW" and settings.shard["stage"] == 2
    said = refused(from_deepspeed({}), tmp_path, max_grad_norm=0.0)
    assert "max_grad_norm=1.0 (or the file has no gradient_clipping" in said
    wrong = {"gradient_clipping": 1.0, "train_batch_size": 64, "optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}
    said = refused(from_deepspeed(wrong), tmp_path)
    assert all(text in said for text in ("max_grad_norm=1.0", "train_batch_size=64", "learning_rate=1.0", '"auto"'))
