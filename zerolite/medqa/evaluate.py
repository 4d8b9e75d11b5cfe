"""`zerolite evaluate MODEL`: how good a model is on held-out rows and multiple choice, alone or against its base.

    zerolite evaluate outputs/medqa --base outputs/base/SmolLM2-135M-Instruct --choices mcq.jsonl
    torchrun --standalone --nproc-per-node 2 -m zerolite.medqa.evaluate outputs/medqa --stage 3

It writes `evaluation.json`, `evaluation.md` and `evaluation.html`. Nothing of it is medical advice.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import transformers

import zerolite
from zerolite.medqa import data, machine, opening, processes, readers, terminal
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.evaluation import choices, pages, record, texts
from zerolite.medqa.evaluation.measure import Measured, Work, measure, safety_questions, with_system
from zerolite.medqa.generation import Settings
from zerolite.medqa.images import rows as image_rows
from zerolite.medqa.images.sight import SIGHTS
from zerolite.medqa.opening import Opened
from zerolite.medqa.processes import Processes
from zerolite.medqa.prompts import prompt_of
from zerolite.medqa.questions import source_of
from zerolite.medqa.rows import conversation

WRITTEN = ("evaluation.json", "evaluation.md", "evaluation.html")
LIBRARIES = ("sacrebleu", "rouge-score", "jieba")
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Prepared:
    """What was found to be right before a model is opened."""

    given: argparse.Namespace
    work: Work
    data: list[dict[str, Any]]


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a mistake of the user, 130 after Ctrl-C, 1 for any other failure of a rank."""
    arguments = sys.argv[1:] if argv is None else argv
    if "WORLD_SIZE" not in os.environ:
        return terminal.run("evaluate", lambda given: evaluate(prepare(given), processes.join(), given), arguments)
    rank = processes.environment_rank()
    processes.end_with_torchrun()
    transformers.logging.disable_progress_bar()
    try:
        evaluate(prepare(arguments), processes.join(), arguments)
    except (ValueError, OSError, zerolite.ZeroliteError) as error:
        return processes.refuse(error, rank, program="zerolite evaluate")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        return processes.report_failure(error, rank)
    return 0


def prepare(arguments: list[str]) -> Prepared:
    """Read options and files. Raises ValueError and DataError for what is wrong with them."""
    parser = terminal.Parser("evaluate", "How good a model is, alone or against its base.")
    add = parser.add_argument
    add(
        "--validation_file", nargs="+", type=Path, default=[], metavar="FILE", help="held-out rows, as train_medqa.py's"
    )
    add("--choices", nargs="+", type=Path, default=[], metavar="FILE", help="rows of `question`, `options`, `answer`")
    add("--columns", help="what columns of --validation_file are: question=title,answer=reply")
    add("--image_folder", type=Path, metavar="FOLDER", help="of the images that rows of --validation_file name")
    add("--skip_invalid", action="store_true", help="leave out rows that are not usable, and count them")
    add("--max_samples", type=terminal.count, help="rows of a file at most (default: all)")
    add("--max_answers", type=int, default=100, help="rows of a language whose questions are answered (default: 100)")
    add("--cutoff_len", type=terminal.count, default=2048, help="longest row in tokens, where the model reads so many")
    add("--batch_size", type=terminal.count, default=8, help="rows at once (default: 8)")
    add("--stage", type=int, choices=(0, 3), default=0, help="3: parameters are sharded over the ranks (default: 0)")
    add("--output_dir", type=Path, default=Path("outputs/evaluation"), help="default: outputs/evaluation")
    given = parser.parse_args(arguments)
    if given.temperature:
        raise ValueError(f"--temperature {given.temperature}: an evaluation's answers are greedy")
    if given.max_answers < 0:
        raise ValueError(f"--max_answers {given.max_answers}: expected at least 0")
    texts.require()
    there = [given.output_dir / name for name in WRITTEN if (given.output_dir / name).exists()]
    if there:
        raise ValueError(f"{there[0]}: exists: remove it, or name another --output_dir")
    opening.find(given.model)
    rows, about = _rows(given)
    questions, about_choices = _questions(given)
    settings = Settings(max_new_tokens=given.max_new_tokens)
    answered = [n for of in _by_language(rows).values() for n in of[: given.max_answers]]
    work = Work(rows, sorted(answered), questions, safety_questions(), given.batch_size, given.cutoff_len, settings)
    return Prepared(given, work, [*about, *about_choices])


def _by_language(rows: list[data.Conversation]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault(row.language, []).append(number)
    return found


def _rows(given: argparse.Namespace) -> tuple[list[data.Conversation], list[dict]]:
    """Held-out rows, the shipped ones where no file is named, and what is told of their files."""
    files = given.validation_file
    if not files and not given.choices:
        files = sorted(CORPUS.glob("validation.*.jsonl"))
    if not files:
        return [], []
    columns = given.columns if given.validation_file else None
    found = data.read(
        files,
        skip_invalid=given.skip_invalid,
        max_samples=given.max_samples,
        rows_of=readers.reader(columns),
        usable=conversation if given.image_folder is None else image_rows.usable(given.image_folder, conversation),
    )
    holds = "held-out rows" if given.validation_file else "held-out rows (shipped)"
    about = [_about(file, holds, kept, found.rejected) for file, kept, _ in found.files]
    return found.kept, about


def _questions(given: argparse.Namespace) -> tuple[list[choices.Question], list[dict]]:
    questions, about = [], []
    for file in given.choices:
        kept, rejected = choices.read(file, given.skip_invalid, given.max_samples)
        questions += kept
        about.append(_about(str(file), "multiple choice", len(kept), rejected))
    return questions, about


def _about(file: str, holds: str, used: int, rejected: list[data.Reject]) -> dict:
    reasons = [str(one) for one in rejected if one.file == file]
    return {"file": file, "holds": holds, "read": used + len(reasons), "rejected": len(reasons), "used": used} | (
        {"reasons": reasons} if reasons else {}
    )


def evaluate(prepared: Prepared, ranks: Processes, arguments: list[str]) -> None:
    """Measure, and write the three files on rank 0. Every rank must call it.

    Raises ValueError for a model that cannot be opened, or for rows that it cannot read.
    """
    started_s, given, work = time.perf_counter(), prepared.given, prepared.work
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    if ranks.rank == 0:
        terminal.say(terminal.NOTICES)
        given.output_dir.mkdir(parents=True, exist_ok=True)
    folders = {record.MODEL: given.model} | ({record.BASE: given.base} if given.base is not None else {})
    is_adapter = (opening.find(given.model) / opening.ADAPTER).is_file()
    measured: dict[str, Measured] = {}
    models: dict[str, dict] = {}
    for of, folder in folders.items():
        base = given.base if is_adapter and of == record.MODEL else None
        opened = opening.open_model(
            folder, base, given.tokenizer_name_or_path, given.template, given.precision, given.stage
        )
        settings = dataclasses.replace(
            work.settings, max_new_tokens=work.settings.max_new_tokens or min(MAX_NEW_TOKENS, opened.room // 2)
        )
        if given.stage and any(row.images for row in work.rows) and opened.tokenizer in SIGHTS:
            SIGHTS[opened.model] = SIGHTS[opened.tokenizer]
        models[of] = _about_model(opened, settings, work, given.system)
        if ranks.rank == 0:
            terminal.say(f"{opened.folder}: {opened.told}")
        measured[of] = measure(opened, dataclasses.replace(work, settings=settings), given.system, ranks)
        del opened
        gc.collect()
    if ranks.rank != 0:
        return
    run = {
        "command": _command(arguments),
        "date": date,
        "duration_s": time.perf_counter() - started_s,
        "machine": machine.hardware(ranks.device),
        "device": ranks.device.type,
        "ranks": ranks.world_size,
        "stage": given.stage,
    }
    settings = {name: getattr(given, name) for name in ("batch_size", "cutoff_len", "max_answers", "max_samples")}
    settings = {name: value for name, value in settings.items() if value is not None}
    settings |= {"system": given.system} if given.system else {}
    notices = terminal.NOTICES.split(". ", 1)
    notices = [f"{notices[0]}.", notices[1]]
    versions = {"code": machine.code_version(), "Python": platform.python_version()}
    versions |= machine.library_versions(*LIBRARIES)
    found = record.Evaluation(notices, run, versions, models, settings, prepared.data)
    record.fill(found, work, measured)
    write(found, given.output_dir)


def _about_model(opened: Opened, settings: Settings, work: Work, system: str) -> dict[str, Any]:
    asked = [*work.rows, *(data.Conversation(((q.asked("letter"), ""),)) for q in work.questions[:1])]
    (first,) = with_system(asked[:1], system)
    prompt = prompt_of(first, opened.tokenizer, opened.room - settings.longest(opened.room))
    source = source_of(opened, settings)
    return {
        "folder": str(opened.folder),
        "template": opened.told.removeprefix("chat template: "),
        "template_sha256": source["template"],
        "precision": source["precision"],
        "reads": opened.room,
        "max_new_tokens": settings.longest(opened.room),
        "weights": opened.print,
        "first_prompt": opened.tokenizer.decode(prompt.ids),
    }


def write(found: record.Evaluation, folder: Path) -> None:
    """The three files, and on stdout what stands in the page but for the texts."""
    title = f"Evaluation of {found.models[record.MODEL]['folder']}"
    text = json.dumps(dataclasses.asdict(found), ensure_ascii=False, indent=1, allow_nan=False)
    page = pages.markdown(found, title)
    for name, content in zip(WRITTEN, (text + "\n", page, pages.page(found, title)), strict=True):
        (folder / name).write_text(content, encoding="utf-8", errors="backslashreplace")
    print(pages.summary(found))
    terminal.say(f"written: {', '.join(str(folder / name) for name in WRITTEN)}")


def _command(arguments: list[str]) -> str:
    if "WORLD_SIZE" in os.environ:
        text = processes.launched("-m", "zerolite.medqa.evaluate", *arguments)
    else:
        text = shlex.join(["zerolite", "evaluate", *arguments])
    return processes.without_secrets(text)


if __name__ == "__main__":
    processes.leave(main())
