"""`--report_to`: the numbers of `metrics.jsonl` also as a run of W&B, TensorBoard or trackio.

[Note: a tracker never ends or delays training]
Each tracker runs in a thread of its own, which imports, opens, writes and closes; training only puts numbers into its
queue. What it raises is told once and it gets no more numbers. Its end is waited for CLOSE_S at most.

What leaves this process: the numbers, the settings in TRACKED, sizes, device and versions. No path, no text of rows or
answers, no key, no host name, no command line, no code and nothing of the console.

A job is one run of a tracker, also where it was stopped and goes on: `trackers.json` in the output folder has its
name. Steps that were reported before the stop are done again after it, with the same numbers; they are not reported
twice, since W&B refuses steps that go back.
"""

import json
import netrc
import os
import queue
import threading
import time
import uuid
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import torch
import transformers
from torch import nn

import zerolite
from zerolite.medqa.arguments import Options
from zerolite.medqa.processes import Processes, without_secrets

TRACKERS = "trackers.json"
PROJECT = "zerolite-medqa"
CLOSE_S = 20.0  # for the end of all trackers together
CLOSE_FAILED_S = 2.0  # where the run failed: other ranks wait to hear why
MAX_WAITING = 10_000  # records of a tracker that does not answer
# Numbers and choices alone: an option that may hold a path or a text of the user is not here.
TRACKED = (
    "finetuning_type", "lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "loraplus_lr_ratio",
    "num_virtual_tokens", "prompt_init", "prompt_encoder", "stage", "precision", "gradient_checkpointing", "offload",
    "offload_budget", "offload_workers", "offload_states", "offload_parameters", "max_samples", "cutoff_len",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "optim",
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "seed", "eval_steps",
)  # fmt: skip


def require(names: tuple[str, ...]) -> None:
    """ValueError for a tracker whose package is not installed, and for `none` beside another."""
    if "none" in names and len(names) > 1:
        raise ValueError(f"--report_to: expected none alone, or trackers, got {' '.join(names)}")
    missing = [name for name in names if name != "none" and find_spec(name) is None]
    if missing:
        raise ValueError(f"--report_to {' '.join(missing)}: not installed: pip install 'zerolite[monitor]'")


def settings_of(options: Options, model: nn.Module, processes: Processes) -> dict:
    """What trackers are told of a run beside its numbers: plain values, of TRACKED options and of the machine."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    device = processes.device
    return {name: getattr(options, name) for name in TRACKED} | {
        "model_class": type(model).__name__,
        "num_trained_parameters": counts[True],
        "num_frozen_parameters": counts[False],
        "world_size": processes.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            "zerolite": zerolite.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


class Trackers:
    """The trackers of a run; none on ranks other than 0."""

    def __init__(self, options: Options, folder: Path, model: nn.Module, processes: Processes):
        self.say = processes.print
        self.running: list[Tracker] = []
        self.last_step, self.names_at_last = -1, set[str]()
        names = [name for name in options.report_to if name != "none"] if processes.rank == 0 else []
        if names:
            settings, run = settings_of(options, model, processes), run_name(folder, options.resume is not None)
            self.running = [Tracker(BACKENDS[name](folder, run, settings)) for name in names]
            self.say(f"run {run}, numbers only, no texts: " + "; ".join(one.backend.where for one in self.running))

    def start(self) -> None:
        for tracker in self.running:
            tracker.start()

    def skip(self, records: list[dict]) -> None:
        """Take `records`, those of metrics.jsonl before the run was stopped, for reported."""
        for record in records:
            self._fresh(record)

    def log(self, record: dict) -> None:
        """Report a record of metrics.jsonl, less what was reported before and what is no number."""
        numbers = {name: value for name, value in self._fresh(record).items() if value is not None}
        for tracker in self.running if numbers else []:
            tracker.put(record["step"], numbers)
        self._tell_failures()

    def close(self, has_failed: bool = False) -> None:
        """Have the trackers write what they have; wait for it no longer than CLOSE_S."""
        end_s = time.monotonic() + (CLOSE_FAILED_S if has_failed else CLOSE_S)
        for tracker in self.running:
            tracker.end(has_failed)
        for tracker in self.running:
            tracker.join(max(end_s - time.monotonic(), 0))
            if tracker.is_alive():
                self.say(f"--report_to {tracker.backend.name}: does not end: its last numbers may be missing there")
        self._tell_failures()
        self.running = []

    def _fresh(self, record: dict) -> dict:
        """What of a record is of a later step than all before, or of the last step and not yet reported."""
        step = record["step"]
        if step > self.last_step:
            self.last_step, self.names_at_last = step, set()
        fresh = {k: v for k, v in record.items() if k != "step" and k not in self.names_at_last}
        if step < self.last_step:
            return {}
        self.names_at_last |= fresh.keys()
        return fresh

    def _tell_failures(self) -> None:
        for tracker in [one for one in self.running if one.failure is not None]:
            self.running.remove(tracker)
            failure = without_secrets(f"{type(tracker.failure).__name__}: {tracker.failure}")
            self.say(f"--report_to {tracker.backend.name}: failed, the run goes on without it: {failure}")


def run_name(folder: Path, is_resumed: bool) -> str:
    """The job's name at its trackers: that of the run that was stopped in this folder, else a new one."""
    file = folder / TRACKERS
    if is_resumed:
        try:
            return str(json.loads(file.read_text(encoding="utf-8"))["run"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # it had no tracker, or goes on from another folder
    run = f"medqa-{uuid.uuid4().hex[:8]}"
    file.write_text(json.dumps({"run": run}) + "\n", encoding="utf-8")
    return run


class Tracker(threading.Thread):
    """One backend, opened, written and closed in this thread. See [Note: a tracker never ends or delays training]."""

    def __init__(self, backend: "Wandb | TensorBoard | Trackio"):
        super().__init__(name=f"tracker {backend.name}", daemon=True)
        self.backend = backend
        self.failure: BaseException | None = None
        self.records: queue.Queue = queue.Queue(MAX_WAITING)

    def run(self) -> None:
        try:
            self.backend.open()
            while isinstance(record := self.records.get(), tuple):
                self.backend.log(*record)
            self.backend.close(has_failed=record)
        except BaseException as error:  # SystemExit, too: a library ends this thread at most
            self.failure = error

    def put(self, step: int, numbers: dict) -> None:
        try:
            self.records.put_nowait((step, numbers))
        except queue.Full:
            self.failure = TimeoutError(f"{MAX_WAITING} records wait for it")

    def end(self, has_failed: bool) -> None:
        if not self.records.full():
            self.records.put_nowait(has_failed)


# --- what differs between them ---------------------------------------------------------------------------------------


class Wandb:
    name = "wandb"

    def __init__(self, folder: Path, run: str, settings: dict):
        self.run_name, self.settings = run, settings
        self.folder = Path(os.environ.get("WANDB_DIR") or folder)
        self.mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        self.where = f"wandb {self.mode}"
        if self.mode == "offline":
            why = "" if os.environ.get("WANDB_MODE") else "no key is configured; "
            self.where += f" ({why}`wandb sync {self.folder}/wandb/offline-run-*` sends it)"

    def open(self) -> None:
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        # What it would collect by itself, the console with the answers in it and the command line included, stays here.
        private = wandb.Settings(
            mode=self.mode,
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            host="-",
            program="-",
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            finish_timeout=CLOSE_S,  # of its own hook at the end of the process, too
        )
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=self.run_name,
            name=self.run_name,
            config=self.settings,
            resume="allow",
            dir=str(self.folder),
            settings=private,
        )

    def log(self, step: int, numbers: dict) -> None:
        self.run.log(numbers, step=step)

    def close(self, has_failed: bool) -> None:
        self.run.finish(exit_code=int(has_failed))


def _has_wandb_key() -> bool:
    """Whether W&B would find a key: in the environment, or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class TensorBoard:
    name = "tensorboard"

    def __init__(self, folder: Path, run: str, settings: dict):
        self.folder, self.settings = folder / "tensorboard" / run, settings
        self.where = f"`tensorboard --logdir {self.folder.parent}`"

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder))
        self.writer.add_text("settings", "\n".join(f"- {name}: {value}" for name, value in self.settings.items()))

    def log(self, step: int, numbers: dict) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a run that is killed keeps its curves

    def close(self, has_failed: bool) -> None:
        self.writer.close()


class Trackio:
    name = "trackio"

    def __init__(self, folder: Path, run: str, settings: dict):
        self.run_name, self.settings = run, settings
        self.where = f"`trackio show --project {PROJECT}`"

    def open(self) -> None:
        import trackio

        # Its own readings of the machine come between ours with times, not steps.
        self.run = trackio.init(
            project=PROJECT,
            name=self.run_name,
            config=self.settings,
            resume="allow",
            auto_log_gpu=False,
            auto_log_cpu=False,
            embed=False,
        )

    def log(self, step: int, numbers: dict) -> None:
        self.run.log(numbers, step=step)

    def close(self, has_failed: bool) -> None:
        self.run.finish()


BACKENDS = {backend.name: backend for backend in (Wandb, TensorBoard, Trackio)}
