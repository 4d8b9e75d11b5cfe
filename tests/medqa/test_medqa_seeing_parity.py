"""In fp64, models that see train as in plain torch: at every stage, with a rank that has no image in a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from seeing_models import FAMILIES, build, tokenizer_of, write_processor
from shapes import write_rows

import zerolite
from zerolite.medqa import data
from zerolite.medqa.batches import collate, micro_batches
from zerolite.medqa.images import rows, sight, tower
from zerolite.medqa.loss import label_loss
from zerolite.medqa.processes import join
from zerolite.medqa.prompts import IGNORED, Example, encode

NUM_STEPS, STEP_ROWS = 3, 4
RATE, MAX_NORM = 1e-2, 0.25

Trained = tuple[list[float], list[float]]  # losses a label token, gradient norms before clipping


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each family with its processor, and rows of images in it."""
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp(family)
        tokenizer_of(family).save_pretrained(found[family])
        write_processor(found[family], family)
        write_rows(found[family], NUM_STEPS * STEP_ROWS // 2, text_rows=NUM_STEPS * STEP_ROWS // 2)
    return found


def begin(family: str, folder: Path, checkpointing: bool) -> tuple[torch.nn.Module, list[Example], sight.Sight]:
    """(the model with its tower frozen, examples, where every second one has an image)."""
    model, tokenizer = build(family, torch.float64).train(), tokenizer_of(family)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tower.freeze(model)
    sees = sight.look(folder, tokenizer, model.config)
    kept = data.read([folder / "rows-0.jsonl"], usable=rows.usable(folder)).kept
    examples, _ = encode(kept, tokenizer, 128)
    seen, plain = ([one for one in examples if bool(one.images) is has] for has in (True, False))
    return model, [one for pair in zip(seen, plain, strict=True) for one in pair], sees


def num_labels_of(step: int, examples: list[Example]) -> int:
    return sum(one.num_labels for one in examples[step * STEP_ROWS : (step + 1) * STEP_ROWS])


def plainly(family: str, folder: Path) -> Trained:
    """By transformers and torch alone, the joint batch on one process."""
    model, examples, _ = begin(family, folder, checkpointing=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        batch = collate(examples[step * STEP_ROWS : (step + 1) * STEP_ROWS], 0)
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, MAX_NORM).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def on_rank(
    family: str,
    folder: Path,
    stages: tuple[int, int],
    offload: str | None,
    checkpointing: bool,
    saved: Path | None = None,
) -> Trained:
    """By zerolite. stages: of the first steps, and of the last, which goes on from a checkpoint where they differ."""
    ranks = join()
    losses, norms, optimizer = [], [], None

    def start(stage: int):
        model, examples, sees = begin(family, folder, checkpointing)
        model = zerolite.shard(model, stage=stage, offload=offload)
        if stage == 3:
            sight.SIGHTS[model] = sees
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, examples, zerolite.AdamW(trained, lr=RATE, max_grad_norm=MAX_NORM)

    model, examples, optimizer = start(stages[0])
    for step in range(NUM_STEPS):
        if step == NUM_STEPS - 1 and stages[0] != stages[1]:
            zerolite.save(model, saved, optimizer)
            model, examples, optimizer = start(stages[1])
            zerolite.load(model, saved, optimizer)
        num_labels, loss_sum = num_labels_of(step, examples), 0.0
        parts = micro_batches(range(step * STEP_ROWS, (step + 1) * STEP_ROWS), ranks.rank, ranks.world_size, 1)
        for index, part in enumerate(parts):  # of two ranks, one has the images
            with zerolite.no_sync(model, enabled=index + 1 < len(parts)):
                loss = label_loss(model, collate([examples[row] for row in part], 0))
                (loss * (ranks.world_size / num_labels)).backward()
            loss_sum += loss.item()
        optimizer.step()
        losses.append(ranks.sum(loss_sum)[0] / num_labels)
        norms.append(float(optimizer.grad_norm))
        optimizer.zero_grad()
    return losses, norms


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_norms_are_those_of_plain_torch(ranks, folders, family, stage, world, offload, checkpointing):
    losses, norms = plainly(family, folders[family])
    assert min(norms) > MAX_NORM, "clipping must bite"
    for found in ranks(world).run(on_rank, family, folders[family], (stage, stage), offload, checkpointing):
        assert found[0] == pytest.approx(losses, rel=1e-12)
        assert found[1] == pytest.approx(norms, rel=1e-12)


@pytest.mark.parametrize("stages", [(1, 3), (3, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.each
def test_what_is_saved_at_one_stage_goes_on_at_another(ranks, folders, tmp_path, family, stages):
    losses, norms = plainly(family, folders[family])
    for found in ranks(2).run(on_rank, family, folders[family], stages, None, False, tmp_path / "checkpoint"):
        assert found[0] == pytest.approx(losses, rel=1e-12)
        assert found[1] == pytest.approx(norms, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_frozen_and_its_projector_trains(folders, family):
    model, _, _ = begin(family, folders[family], checkpointing=False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if family == "llava":
        assert frozen == {name for name, _ in model.named_parameters() if "vision_tower" in name}
    else:
        assert frozen == {name for name, _ in model.named_parameters() if ".visual." in name and "merger" not in name}
    assert frozen
