"""Do all ranks load one checkpoint, whole, whatever happens to its folder or to one of them meanwhile?"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from resigned import unchanged
from saved import attempt, make, rank, state, train
from torch import nn

import zerolite
from zerolite.checkpoint import load as loading
from zerolite.checkpoint import saved_files
from zerolite.checkpoint.saved_files import SavedFolder
from zerolite.runtime import atomic_dir


def save_version(folder: Path, steps: int) -> None:
    model, optimizer = make(3)
    train(model, optimizer, range(steps))
    zerolite.save(model, folder, optimizer, extra={"version": steps, "values": torch.full((4,), float(steps))})


def version_loaded(folder: Path) -> tuple:
    """What `load` made of a folder: its error, or all of the state and `extra`."""
    model, optimizer = make(3, seed=1)
    extras = []
    error = attempt(lambda: extras.append(zerolite.load(model, folder, optimizer)))
    return error, state(model, optimizer), extras


MOMENTS = ["open", "open_files", "verify", "_fill"]


def load_exchanged(root: Path, moment: str, who: list[int]) -> tuple:
    """Rank 0 exchanges the folder as `save` does, right after a moment of the load; `who` then has to see it."""
    owner = loading if moment in ("verify", "_fill") else SavedFolder
    original = getattr(owner, moment)

    def exchanging(*arguments):
        result = original(*arguments) if moment != "_fill" else None
        if rank() == 0:
            shutil.copytree(root / "new", root / ".now.tmp-1")
            atomic_dir.commit_folder(root / ".now.tmp-1", root / "now")
        return original(*arguments) if moment == "_fill" else result

    if rank() in who:
        setattr(owner, moment, exchanging)
    try:
        return version_loaded(root / "now")
    finally:
        setattr(owner, moment, original)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_folder_that_is_exchanged_while_it_is_loaded_is_one_version_or_refused(ranks, tmp_path, moment):
    """The old version's bits on both ranks, or a CheckpointError on both that left the model as it was."""
    for name, steps in (("now", 1), ("new", 2)):
        ranks(2).run(save_version, tmp_path / name, steps)
    old = ranks(2).run(version_loaded, tmp_path / "now")
    fresh = ranks(2).run(version_loaded, tmp_path / "nothing")
    found = ranks(2).run(load_exchanged, tmp_path, moment, [0])
    kinds = {kind for (kind, _), _, _ in found}
    assert len(kinds) == 1, kinds
    for (error, tensors, extras), (_, expected, expected_extras), (_, untouched, _) in zip(
        found, old, fresh, strict=True
    ):
        if error[0]:
            assert error[0] == "CheckpointError" and moment != "_fill" and unchanged(untouched, tensors), error
        else:
            assert unchanged(expected, tensors)
            assert extras[0]["version"] == expected_extras[0]["version"] == 1
            assert torch.equal(extras[0]["values"], torch.ones(4))


def load_exchanged_after_hashing(root: Path) -> tuple:
    """The folder is another one as soon as its only file is hashed."""
    original = atomic_dir.sha256_of

    def exchanging(path: Path) -> str:
        digest = original(path)
        shutil.copytree(root / "new", root / ".now.tmp-1")
        atomic_dir.commit_folder(root / ".now.tmp-1", root / "now")
        return digest

    atomic_dir.sha256_of = exchanging
    try:
        return version_loaded(root / "now")
    finally:
        atomic_dir.sha256_of = original


def test_the_file_that_was_hashed_is_the_one_that_is_read(ranks, tmp_path):
    """Opened by its path again, it would be the new one, with the old one's steps and rates."""
    for name, steps in (("now", 1), ("new", 2)):
        ranks(1).run(save_version, tmp_path / name, steps)
    ((_, expected, _),) = ranks(1).run(version_loaded, tmp_path / "now")
    ((error, tensors, extras),) = ranks(1).run(load_exchanged_after_hashing, tmp_path)
    assert error == ("", "") and unchanged(expected, tensors) and extras[0]["version"] == 1


def load_two_folders(root: Path) -> tuple[str, str]:
    """Each rank has a folder of its own there, as on two machines without a shared disk."""
    model, optimizer = make(3, seed=1)
    real = saved_files.SavedFolder.__init__

    def init(self, folder: Path) -> None:
        real(self, root / ("now" if rank() == 0 else "new"))

    saved_files.SavedFolder.__init__ = init
    try:
        return attempt(lambda: zerolite.load(model, root / "now", optimizer))
    finally:
        saved_files.SavedFolder.__init__ = real


def test_ranks_that_see_different_checkpoints_refuse_both(ranks, tmp_path):
    """Each is whole and right; half of one with half of the other would be neither."""
    for name, steps in (("now", 1), ("new", 2)):
        ranks(2).run(save_version, tmp_path / name, steps)
    for kind, text in ranks(2).run(load_two_folders, tmp_path):
        assert kind == "CheckpointError" and "ranks see different checkpoints" in text


FAILING: dict[str, tuple[object, str]] = {
    "opening": (SavedFolder, "open"),
    "opening the files": (SavedFolder, "open_files"),
    "the extra": (SavedFolder, "extra_of_rank"),
    "reading": (loading, "_read"),
}


def load_while_failing(folder: Path, where: str) -> tuple[str, str, bool]:
    model, optimizer = make(3, seed=1)
    before = state(model, optimizer)
    owner, name = FAILING[where]
    original = getattr(owner, name)

    def stale(*arguments):
        raise OSError(errno.ESTALE, "Stale file handle")

    if rank() == 1:
        setattr(owner, name, stale)
    try:
        return *attempt(lambda: zerolite.load(model, folder, optimizer)), unchanged(before, state(model, optimizer))
    finally:
        setattr(owner, name, original)


@pytest.mark.parametrize("where", FAILING)
def test_a_rank_that_fails_anywhere_in_a_load_fails_it_on_all(ranks, tmp_path, where):
    """At once, by the rank's name; only a failure in the middle of the values leaves some of them, and says so."""
    ranks(2).run(save_version, tmp_path / "step", 1)
    for kind, text, is_unchanged in ranks(2).run(load_while_failing, tmp_path / "step", where):
        assert kind == "CheckpointError" and "rank 1: OSError" in text and "Stale" in text
        assert is_unchanged or "is loaded in part" in text


def save_and_load_tensor_rates(folder: Path) -> tuple[list[float], list[float], bool]:
    """Rates of an optimizer whose lr is a tensor, and of one whose lr is a number, after loading it."""

    def new(rate) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = zerolite.shard(nn.Linear(4, 4), stage=0)
        return model, zerolite.AdamW(model.parameters(), lr=rate)

    saved = torch.tensor(3e-3)
    model, optimizer = new(saved)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    zerolite.save(model, folder, optimizer)
    here = torch.tensor(1.0)
    rates = []
    for rate in (here, 1.0):
        model, optimizer = new(rate)
        zerolite.load(model, folder, optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
    return [float(rate) for rate in rates], [saved.item()] * 2, rates[0] is here


def test_a_rate_that_is_a_tensor_is_saved_as_its_number_and_loaded_in_place(ranks, tmp_path):
    """What holds that tensor (a captured graph, a scheduler) sees the loaded rate; a number stays a number."""
    for rates, expected, is_in_place in ranks(2).run(save_and_load_tensor_rates, tmp_path / "step"):
        assert rates == expected and is_in_place
