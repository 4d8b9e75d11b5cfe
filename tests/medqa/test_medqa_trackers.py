"""Do trackers get the curves of a job as one run and nothing else, and can they end or hold up a training?"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import threading
from pathlib import Path

import pytest
import torch
from medqa_runs import tiny_llama, to_flags

import train_medqa
from zerolite.medqa import divergence, processes, trackers
from zerolite.medqa.arguments import CORPUS, Options, parse
from zerolite.medqa.processes import Processes
from zerolite.medqa.progress import METRICS, read_metrics

ALL_OF_THEM = ["wandb", "tensorboard", "trackio"]
SECRET = "k3y0000000000000000000000000000000000000"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("secretbase")
    tiny_llama().save_pretrained(folder)
    return folder


# One run a job, read back from the trackers' own files #


def stopped_and_resumed(argv: list[str], environment: dict[str, str]) -> list[int]:
    """A run that gets SIGTERM at its third step, a second after its newest checkpoint, and goes on."""
    before = dict(os.environ)
    os.environ.update(environment)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]  # it reads its folder when it is imported, as trl did where its trainers are tested
    add = divergence.Divergence.add

    def add_and_stop(self, step: int, optimizer) -> None:
        add(self, step, optimizer)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    try:
        divergence.Divergence.add = add_and_stop
        first = train_medqa.train(train_medqa.prepare(parse(argv)))
        divergence.Divergence.add = add
        checkpoint = Path(parse(argv).output_dir) / "checkpoint-2"  # not the newest: step 3 is done again
        if processes.environment_rank() == 0:
            shutil.rmtree(checkpoint.with_name("checkpoint-3"))
        return [first, train_medqa.train(train_medqa.prepare(parse([*argv, "--resume", str(checkpoint)])))]
    finally:
        divergence.Divergence.add = add
        os.environ.clear()
        os.environ.update(before)


def test_a_job_on_two_ranks_is_one_run_in_each_trackers_files_also_after_a_stop(ranks, base, tmp_path):
    pytest.importorskip("wandb"), pytest.importorskip("trackio")
    output = tmp_path / "secretoutput"
    sizes = {"cutoff_len": 64, "max_samples": 6, "max_steps": 5, "logging_steps": 1, "save_steps": 2, "eval_steps": 2}
    named = {"model_name_or_path": base, "tokenizer_name_or_path": CORPUS / "tokenizer", "output_dir": output}
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_API_KEY": SECRET}
    argv = [*to_flags({**named, **sizes}), "--report_to", *ALL_OF_THEM]
    assert ranks(2).run(stopped_and_resumed, argv, environment) == [[128 + signal.SIGTERM, 0]] * 2

    run = json.loads((output / trackers.TRACKERS).read_text())["run"]
    found = {
        "wandb": read_wandb(output / "wandb", run),
        "tensorboard": read_tensorboard(output / "tensorboard", run),
        "trackio": read_trackio(tmp_path / "trackio", run),
    }
    expected = {}
    for record in read_metrics(output / METRICS):
        for name, value in record.items():
            if name != "step" and value is not None:
                expected.setdefault(name, {})[record["step"]] = value
    assert {"loss", "validation_loss_en", "validation_loss_zh", "grad_norm", "host_memory_bytes"} <= expected.keys()
    for name, curves in found.items():
        assert curves.keys() == expected.keys(), name
        for key, curve in curves.items():
            steps = [step for step, _ in curve]
            assert steps == sorted(set(steps)) == sorted(expected[key]), f"{name}: {key}"
            if "second" not in key and "memory" not in key:  # step 3 was measured twice, its loss is the same
                assert [value for _, value in curve] == pytest.approx([expected[key][step] for step in steps], 1e-5)

    for path in [
        *(output / "wandb").rglob("*"),
        *(output / "tensorboard").rglob("*"),
        *(tmp_path / "trackio").iterdir(),
    ]:
        content = path.read_bytes() if path.is_file() else b""
        assert SECRET.encode() not in content, path
        if path.suffix != ".log":  # W&B's own log, which it never sends
            for text in ("secretbase", "secretoutput", "cough", "血压", os.uname().nodename):
                assert text.encode() not in content, (path, text)


def read_tensorboard(folder: Path, run: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert [path.name for path in folder.iterdir()] == [run]
    events = EventAccumulator(str(folder / run)).Reload()
    assert "learning_rate" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_trackio(folder: Path, run: str) -> dict[str, list[tuple[int, float]]]:
    (database,) = folder.glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
        ((config,),) = connection.execute("select config from configs").fetchall()
    assert {row[0] for row in rows} == {run} and len({row[1] for row in rows}) == 1
    assert json.loads(config)["learning_rate"] == 2e-5
    curves: dict[str, list[tuple[int, float]]] = {}
    for _, _, step, metrics in rows:
        for name, value in json.loads(metrics).items():
            curves.setdefault(name, []).append((step, value))
    return curves


def read_wandb(folder: Path, run: str) -> dict[str, list[tuple[int, float]]]:
    """From the transaction logs that `wandb sync` sends: one a process, both of one run."""
    from wandb.proto.wandb_internal_pb2 import Record

    curves: dict[str, list[tuple[int, float]]] = {}
    files = sorted(folder.glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and {path.name for path in files} == {f"run-{run}.wandb"}
    for path in files:
        for chunk in leveldb_records(path.read_bytes()):
            record = Record.FromString(chunk)
            if record.WhichOneof("record_type") == "run":
                assert record.run.run_id == run and record.run.project == trackers.PROJECT
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                step = items.get("_step", record.history.step.num)
                for name in items.keys() - {"_step", "_runtime", "_timestamp"}:
                    curves.setdefault(name, []).append((step, items[name]))
    return curves


def leveldb_records(data: bytes) -> list[bytes]:
    """Of a log in LevelDB's format behind W&B's header of seven bytes: blocks of 32 KiB, records in fragments."""
    records, at, joined = [], 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        joined += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            records.append(joined)
            joined = b""
    return records


# What a tracker does wrong #


class Fake:
    """A backend that keeps what it gets, and fails or hangs where its test says."""

    name = "tensorboard"
    where = "nowhere"
    fails_in = hangs_in = ""

    def __init__(self, folder: Path, run: str, settings: dict):
        self.got, self.settings = [], settings
        self.released = threading.Event()

    def _go(self, name: str) -> None:
        if self.hangs_in == name:
            self.released.wait(60)
        if self.fails_in == name:
            raise SystemExit(f"no {name} at https://user:{SECRET}@host")

    def open(self) -> None:
        self._go("open")

    def log(self, step: int, numbers: dict) -> None:
        self._go("log")
        self.got.append((step, numbers))

    def close(self, has_failed: bool) -> None:
        self._go("close")
        self.has_failed = has_failed


def started(monkeypatch, tmp_path, **faults) -> tuple[trackers.Trackers, Fake]:
    monkeypatch.setitem(trackers.BACKENDS, "tensorboard", type("Faulty", (Fake,), faults))
    options = Options(report_to=("tensorboard",), model_name_or_path="/home/somebody/base", columns="question=my title")
    reported = trackers.Trackers(options, tmp_path, torch.nn.Linear(2, 2), Processes(0, 1, torch.device("cpu")))
    reported.start()
    return reported, reported.running[0].backend


@pytest.mark.parametrize("place", ["open", "log", "close"])
def test_a_tracker_that_fails_is_told_once_without_secrets(monkeypatch, tmp_path, capsys, place):
    reported, backend = started(monkeypatch, tmp_path, fails_in=place)
    tracker = reported.running[0]
    for step in range(3):
        reported.log({"step": step, "loss": 1.0})
    if place != "close":
        tracker.join(30)
    reported.log({"step": 4, "loss": 1.0})
    reported.close()
    out = capsys.readouterr().out
    assert out.count("--report_to tensorboard: failed, the run goes on without it: SystemExit") == 1
    assert SECRET not in out and "somebody" not in out + str(backend.settings) and "title" not in str(backend.settings)


@pytest.mark.parametrize("place", ["open", "log", "close"])
def test_a_tracker_that_hangs_is_left_alone(monkeypatch, tmp_path, capsys, place):
    monkeypatch.setattr(trackers, "CLOSE_S", 0.05)
    monkeypatch.setattr(trackers, "MAX_WAITING", 3)
    reported, backend = started(monkeypatch, tmp_path, hangs_in=place)
    for step in range(6 if place != "close" else 2):
        reported.log({"step": step, "loss": 1.0})
    reported.close()
    backend.released.set()
    out = capsys.readouterr().out
    assert ("3 records wait for it" in out) if place != "close" else ("its last numbers may be missing" in out)


def test_steps_never_go_back_and_nothing_is_reported_twice(monkeypatch, tmp_path):
    reported, backend = started(monkeypatch, tmp_path)
    tracker = reported.running[0]
    reported.skip([{"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.0, "epoch": 0.5}])
    for record in [
        {"step": 2, "validation_loss": 5.0},  # a resumed run validates where it starts
        {"step": 3, "loss": 1.0, "epoch": 0.5},
        {"step": 3, "validation_loss": None, "validation_loss_en": 4.0},
        {"step": 4, "loss": 0.5},
    ]:
        reported.log(record)
    reported.close(has_failed=True)
    tracker.join(30)
    assert backend.got == [(3, {"validation_loss_en": 4.0}), (4, {"loss": 0.5})] and backend.has_failed is True


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_read(monkeypatch, tmp_path):
    known = trackers.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "trackio" else known(name))
    argv = ["--model_name_or_path", "absent", "--output_dir", str(tmp_path / "out"), "--report_to", "tensorboard"]
    with pytest.raises(ValueError, match=r"--report_to trackio: not installed: pip install 'zerolite\[monitor\]'"):
        train_medqa.prepare(parse([*argv, "trackio"]))
    with pytest.raises(ValueError, match="--report_to: expected none alone"):
        train_medqa.prepare(parse([*argv, "none"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": SECRET}, "online"),
        ({"NETRC": ""}, "online"),
        ({"WANDB_MODE": "offline"}, ""),
    ],
)
def test_wandb_goes_online_only_with_a_key(monkeypatch, tmp_path, environment, mode):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if "NETRC" in environment:
        (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
        environment = {}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    backend = trackers.Wandb(tmp_path, "run", {})
    assert backend.mode == (mode or "offline") and SECRET not in backend.where
    assert ("no key is configured" in backend.where) == (mode == "offline")


def test_a_folder_used_again_is_another_run_and_a_resumed_one_the_same(tmp_path):
    first = trackers.run_name(tmp_path, is_resumed=False)
    assert trackers.run_name(tmp_path, is_resumed=True) == first
    assert trackers.run_name(tmp_path, is_resumed=False) != first
