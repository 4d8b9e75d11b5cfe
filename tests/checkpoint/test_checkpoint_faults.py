"""A checkpoint is the old one or the new one, whole, wherever SIGKILL meets the processes that write it.

Processes are forked, ready to save, from a rank. Version v is a model whose every parameter
and state is v.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from limits import Limit, load
from ranks import Pool
from saved import attempt, make
from zygote import fork

HANG_S = 20.0


@pytest.fixture(scope="module")
def parent() -> Iterator[Pool]:
    """A process of its own: one that has never had gloo's or autograd's threads can be forked safely."""
    pool = Pool()
    yield pool
    pool.close()


def fill(model, optimizer, version: int) -> None:
    for unit in model._zerolite.units:
        for bucket in unit.buckets:
            for values in (bucket.shard.values(), *optimizer.resident_states(bucket)):
                values.fill_(version)
    optimizer.set_steps(dict.fromkeys(optimizer.describe()["steps"], version))
    model.sum.fill_(version)


def version_of(folder: Path, model, optimizer) -> int:
    """Load `folder`, and see that all of it is of one version."""
    import zerolite

    fill(model, optimizer, -1)
    version = zerolite.load(model, folder, optimizer)
    for unit in model._zerolite.units:
        for bucket in unit.buckets:
            for values in (bucket.shard.values(), *optimizer.resident_states(bucket)):
                for slot in bucket.layout.slots:
                    found = set(slot.range.of(values).tolist())
                    assert found <= {float(version)}, f"{slot.name} is {found} in version {version}"
    assert set(optimizer.describe()["steps"].values()) == {version} and set(model.sum.tolist()) == {version}
    return version


# at every operation


class Bomb:
    """Kills this process at the n-th file operation of the writing."""

    def __init__(self, fuse: int) -> None:
        self.fuse = fuse

    def tick(self, last_act: Callable[[], None] = lambda: None) -> None:
        self.fuse -= 1
        if self.fuse == 0:
            last_act()
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, function):
        def wrapped(*args, **options):
            self.tick()
            return function(*args, **options)

        return wrapped

    def around_writing(self, function):
        """Before it, with half of the bytes written, and after it."""

        def wrapped(*args, **options):
            path = next(value for value in args if isinstance(value, Path))
            self.tick()
            result = function(*args, **options)
            self.tick(lambda: os.truncate(path, path.stat().st_size // 2))
            self.tick()
            return result

        return wrapped

    def plant(self) -> None:
        from zerolite.runtime import atomic_dir as files
        from zerolite.runtime import safetensors_file

        for name in ("open", "fsync", "close", "mkdir", "rename", "unlink", "rmdir"):
            setattr(os, name, self.before(getattr(os, name)))
        safetensors_file.write_safetensors = self.around_writing(safetensors_file.write_safetensors)
        Path.write_bytes = self.around_writing(Path.write_bytes)
        files._exchange = self.before(files._exchange)


def die_at_every_operation(root: Path, target: str, can_exchange: bool) -> tuple[int, list[str]]:
    """Write version 2 as `target` beside or over version 1, killed at operation 1, 2, ... until it gets through."""
    import zerolite
    from zerolite.runtime import atomic_dir as files

    model, optimizer = make(3, torch.float32)
    reader = make(0, torch.float32)
    fill(model, optimizer, 1)
    zerolite.save(model, root / "first" / "old", optimizer, extra=1)
    exchange = files._exchange
    if not can_exchange:
        files._exchange = lambda first, second: False
    seen = []
    try:
        while True:
            folder = root / "now"
            shutil.copytree(root / "first", folder)

            def write(folder=folder):
                fill(model, optimizer, 2)
                Bomb(len(seen) + 1).plant()
                zerolite.save(model, folder / target, optimizer, extra=2)

            _, status = os.waitpid(fork(write), 0)
            got_through = os.waitstatus_to_exitcode(status) == 0
            assert got_through or os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
            if not can_exchange:  # what the dead one had put aside survives a save that fails
                shutil.copytree(folder, root / "again")
                kind, _ = attempt(lambda: zerolite.save(model, root / "again" / target, optimizer, extra=object()))
                assert kind == "CheckpointError" and version_of(root / "again" / target, *reader) in (1, 2)
                shutil.rmtree(root / "again")
            found = None
            if target == "old" or (folder / target).exists():
                found = version_of(folder / target, *reader)
            if target != "old":
                assert version_of(folder / "old", *reader) == 1
            assert not got_through or found == 2
            # the next save finds its way, and leaves nothing of the dead one
            fill(model, optimizer, 3)
            zerolite.save(model, folder / target, optimizer, extra=3)
            assert sorted(path.name for path in folder.iterdir()) == sorted({"old", target})
            assert version_of(folder / target, *reader) == 3
            shutil.rmtree(folder)
            if got_through:
                return len(seen), [str(version) for version in seen]
            seen.append(found)
    finally:
        files._exchange = exchange


@pytest.mark.parametrize(
    "target, can_exchange",
    [("old", True), ("old", False), ("new", True)],
    ids=["over", "over-by-two-renames", "beside"],
)
def test_killed_at_any_operation_it_is_the_old_or_the_new(parent, tmp_path, target, can_exchange):
    """At each file operation, torn writes included, the folder loads as old or new, and the next save cleans up."""
    ((operations, seen),) = parent(1, distributed=False).run(die_at_every_operation, tmp_path, target, can_exchange)
    assert operations >= 20
    before, after = ("1", "2") if target == "old" else ("None", "2")
    assert set(seen) == {before, after}
    assert seen == sorted(seen, key=[before, after].index)  # old up to one operation, new from there on


# at any moment, on two ranks


def save_for_ever(root: Path, rank: int, stage: int, rendezvous: Path, report: int) -> None:
    """Go on from what is there, writing one version after the other; a byte to `report` for each that is complete."""
    import zerolite

    dist.init_process_group("gloo", store=dist.FileStore(str(rendezvous), 2), rank=rank, world_size=2)
    model, optimizer = make(stage, torch.float32)
    version = zerolite.load(model, root / "step", optimizer)
    while True:
        version += 1
        fill(model, optimizer, version)
        zerolite.save(model, root / "step", optimizer, extra=version)
        os.write(report, b".")


def kill_at_random(root: Path, trials: int, seed: int) -> tuple[int, list[str]]:
    """How many versions were written in all, and what went wrong."""
    import zerolite

    draw = random.Random(seed)
    reader = make(0, torch.float32)
    fill(*reader, 0)
    zerolite.save(reader[0], root / "step", reader[1], extra=0)
    version, failures = 0, []
    for trial in range(trials):
        ear, mouth = os.pipe()
        stage, rendezvous = draw.randrange(4), root / f"rendezvous-{trial}"
        children = []
        for rank in range(2):
            arguments = (root, rank, stage, rendezvous, mouth)
            children.append(fork(lambda arguments=arguments: save_for_ever(*arguments)))
        os.close(mouth)
        select.select([ear], [], [], HANG_S * load())  # the first version is written
        time.sleep(draw.uniform(0, 0.1))
        victims = draw.choice([[0], [1], [0, 1]])
        for victim in victims:
            os.kill(children[victim], signal.SIGKILL)
        for rank, code in enumerate(wait_for(children)):
            expected = -signal.SIGKILL if rank in victims else 3  # the other one hears of it and raises
            if code != expected:
                failures.append(f"trial {trial}: rank {rank} of killed {victims} ended with {code}")
        reported = os.read(ear, 1 << 16).count(b".")
        os.close(ear)
        error = attempt(lambda: version_of(root / "step", *reader))
        if error != ("", ""):
            failures.append(f"trial {trial}: {error}")
            break
        found = zerolite.load(reader[0], root / "step", reader[1])
        if not version + reported // 2 <= found <= version + reported + 1:
            failures.append(f"trial {trial}: version {found} after {version} and {reported} reports of two ranks")
        version = found
    zerolite.save(reader[0], root / "step", reader[1], extra=version)
    rest = sorted(path.name for path in root.iterdir() if not path.name.startswith("rendezvous"))
    if rest != ["step"]:
        failures.append(f"left behind: {rest}")
    return version, failures


def wait_for(children: list[int]) -> list[int | None]:
    """Exit codes; None for one that had to be killed because it hung."""
    codes: dict[int, int | None] = {}
    limit = Limit(HANG_S)
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif limit.is_over():
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    codes[child] = None
        time.sleep(0.002)
    return [codes[child] for child in children]


@pytest.mark.parametrize("trials", [12, pytest.param(120, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_at_any_moment_no_version_is_mixed_or_lost(parent, tmp_path, trials):
    """One or both of two saving ranks die at random: the survivor raises, the folder holds one whole late version."""
    ((versions, failures),) = parent(1, distributed=False, timeout=5.0 * trials + 60).run(
        kill_at_random, tmp_path, trials, 0
    )
    print(f"{trials} kills while {versions} versions were written: {len(failures)} failures")
    assert not failures, "\n".join(failures)
    assert versions >= trials


def forget_to_rename(root: Path) -> None:
    """What the tests above must see: a writer that removes the old folder before the new one has its name."""
    from zerolite.runtime import atomic_dir as files

    commit = files.commit_folder

    def careless(written: Path, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(written, folder)

    files.commit_folder = careless
    try:
        die_at_every_operation(root, "old", True)
    finally:
        files.commit_folder = commit


def test_the_campaign_sees_a_careless_writer(parent, tmp_path):
    """With a commit that removes first and renames then, the kills find the moment without a checkpoint."""
    with pytest.raises(Exception, match="CheckpointError.*(does not exist|missing|manifest)"):
        parent(1, distributed=False).run(forget_to_rename, tmp_path)
