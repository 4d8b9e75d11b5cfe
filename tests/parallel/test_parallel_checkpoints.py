"""Does a checkpoint of one mesh load on every other, and go on as if nothing had happened?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import assert_close
from parallel_runs import Case, difference, run_cases
from safetensors.torch import load_file

from zerolite.checkpoint.consolidate import consolidate

ONE, TENSOR, PIPELINE, ALL = (1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 2, 2)


def check(ranks, world: int, cases: list[Case]) -> None:
    of_ranks = ranks(world, timeout=240.0).run(run_cases, cases)
    found = {case: difference(case, [results[i] for results in of_ranks]) for i, case in enumerate(cases)}
    assert not {case: pair for case, pair in found.items() if not max(pair) < 1e-12}


def test_a_checkpoint_of_one_mesh_goes_on_on_another(ranks, tmp_path):
    """Steps 0 and 1 on one mesh, 2 and 3 on another: parameters, moments and counts are those of one plain run.

    Between whole, split (evenly and not) and staged parameters, at other stages and world sizes.
    """
    split, uneven, staged, plain = (str(tmp_path / name) for name in ("split", "uneven", "staged", "plain"))
    check(
        ranks,
        4,
        [
            Case("llama", TENSOR, 3, sequence=True, steps=(0, 2), save=split),
            Case("mlp", TENSOR, 1, steps=(0, 2), save=uneven),
            Case("llama", PIPELINE, 2, "interleaved", steps=(0, 2), save=staged),
        ],
    )
    check(
        ranks,
        1,
        [
            Case("llama", ONE, 0, steps=(2, 4), load=split),
            Case("llama", ONE, 0, steps=(0, 2), save=plain),
        ],
    )
    check(
        ranks,
        4,
        [
            Case("mlp", PIPELINE, 3, "interleaved", steps=(2, 4), load=uneven),
            Case("llama", TENSOR, 0, steps=(2, 4), load=staged),
        ],
    )
    check(ranks, 8, [Case("llama", ALL, 3, "interleaved", steps=(2, 4), load=plain)])
    check_files(Path(split), 4)
    check_folders(Path(split), Path(staged), Path(plain))


def check_folders(*checkpoints: Path) -> None:
    """Of two steps alike each: as folders of whole tensors, in the dtypes of all stages."""
    found = []
    for checkpoint in checkpoints:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        assert manifest["model"]["dtypes"] == dict.fromkeys(manifest["parameters"], "F64")
        consolidate(checkpoint, checkpoint.with_suffix(".folder"))
        found.append(load_file(checkpoint.with_suffix(".folder") / "model.safetensors"))
    for one in found[:-1]:
        assert_close(one, found[-1], 1e-9, 1e-12)


def check_files(folder: Path, world: int) -> None:
    """One commit: one manifest, whose shapes are of whole tensors, and a file a rank of the world."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(path.name for path in folder.iterdir())[1:] == [f"rank-{n:05d}.safetensors" for n in range(world)]
    assert manifest["parameters"]["layers.0.attention.q.weight"] == [16, 16]
    assert manifest["mesh"] == {"data": [1, 2], "tensor": [2], "pipeline": []}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "mlp"])
def test_every_mesh_loads_every_other(ranks, tmp_path, model):
    meshes = {
        "one": (1, [Case(model, ONE, stage) for stage in (0, 3)]),
        "four": (4, [Case(model, TENSOR, 2), Case(model, TENSOR, 3), Case(model, (2, 1, 2), 0, "gpipe")]),
        "pipeline": (4, [Case(model, PIPELINE, 3, "interleaved"), Case(model, PIPELINE, 1, "1f1b")]),
        "all": (8, [Case(model, ALL, 3, "1f1b"), Case(model, ALL, 0, "interleaved")]),
    }
    folders = []
    for name, (world, cases) in meshes.items():
        saving = [
            Case(c.model, c.mesh, c.stage, c.schedule, steps=(0, 2), save=str(tmp_path / f"{name}-{i}"))
            for i, c in enumerate(cases)
        ]
        check(ranks, world, saving)
        folders += [case.save for case in saving]
    for world, cases in meshes.values():
        loading = [Case(c.model, c.mesh, c.stage, c.schedule, steps=(2, 4), load=f) for c in cases for f in folders]
        check(ranks, world, loading)
