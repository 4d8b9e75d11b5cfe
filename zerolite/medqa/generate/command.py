"""`zerolite generate`: questions, answers and dialogues from a model behind an OpenAI-compatible endpoint.

The endpoint is OPENAI_BASE_URL, its key OPENAI_API_KEY: neither is an option, and the key is written nowhere.
"""

import argparse
import asyncio
import importlib
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import zerolite
from zerolite.medqa.generate import keys, result, runner
from zerolite.medqa.generate.endpoint import Endpoint, Settings
from zerolite.medqa.generate.filters import Filters
from zerolite.medqa.generate.journal import NAME, Journal
from zerolite.medqa.generate.ledger import Ledger
from zerolite.medqa.generate.plan import KINDS, LANGUAGES, SHIPPED_SEEDS, Plan, read_conversations, read_passages
from zerolite.medqa.generate.runner import Outcome

NOTICE = "This is no medical advice: generated texts, for learning and research alone. 生成的内容不构成医疗建议。"
TELL_S = 5.0
NEEDED = ("openai", "tenacity", "json_repair")


class Parser(argparse.ArgumentParser):
    """A mistake is a ValueError."""

    def error(self, message: str):
        raise ValueError(message)


def _number(least: float, kind: type = int):
    def number(text: str):
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number from {least:g}, got {text}")
        return value

    return number


def parser() -> Parser:
    found = Parser("zerolite generate", description=(__doc__ or "").split("\n")[0], epilog=NOTICE, allow_abbrev=False)
    add = found.add_argument
    add("--output_dir", type=Path, required=True, help="folder of rows, card and journal; a run in it goes on")
    add("--model", default=os.environ.get("OPENAI_MODEL"), help="as the endpoint names it (default: OPENAI_MODEL)")
    add("--num_requests", type=_number(1), default=100, help="default: 100; a larger number goes on behind")
    add("--kinds", nargs="+", choices=KINDS, help="default: self_instruct dialogue, and passage with --passage_file")
    add("--languages", nargs="+", choices=LANGUAGES, default=[*LANGUAGES], help="default: en zh")
    add("--seed_file", nargs="+", type=Path, default=[SHIPPED_SEEDS], help="rows to write like (default: shipped ones)")
    add("--passage_file", nargs="+", type=Path, default=[], help="JSONL with `text`, or any text in UTF-8")
    add("--evaluation_file", nargs="+", type=Path, default=[], help="rows that nothing generated may repeat")
    add("--prompts", type=Path, help="folder of files that take the place of the shipped prompts of their names")
    add("--licence", default="unknown", help="of rows that are made of seed tasks, or of passages that name none")
    add("--seed", type=int, default=0)
    add("--concurrency", type=_number(1), default=8, help="requests in flight (default: 8)")
    add("--temperature", type=_number(0, float), help="default: the endpoint's own")
    add("--max_new_tokens", type=_number(1), default=2048, help="of one answer (default: 2048)")
    add("--response_format", choices=["json_object", "none"], default="json_object", help="none where it is unknown")
    add("--timeout", type=_number(0.01, float), default=120.0, help="seconds for one attempt (default: 120)")
    add("--max_retries", type=_number(0), default=7, help="after 429, 5xx, time-outs, lost connections (default: 7)")
    add("--retry_wait", type=_number(0, float), default=1.0, help="seconds, doubled each time (default: 1)")
    add("--price_in", type=_number(0, float), default=0.0, help="of a million prompt tokens")
    add("--price_out", type=_number(0, float), default=0.0, help="of a million completion tokens")
    add("--max_cost", type=_number(0, float), help="ceiling of all runs of the folder; no request is sent beyond it")
    add("--max_tokens_total", type=_number(0), help="the same in tokens, of prompts and completions")
    return found


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 where every request has its answer, 1 where not, 2 for a mistake of the user."""
    argv = sys.argv[1:] if argv is None else argv
    for name in ("openai", "httpx", "httpx2", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)  # at DEBUG they write requests with their headers
    key = keys.Key(os.environ.get("OPENAI_API_KEY", "").strip())
    try:
        return generate(argv)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        if (error.name or "zerolite").split(".")[0] not in NEEDED:
            raise
        print(f"zerolite generate: error: it needs {error.name}: pip install 'zerolite[generate]'", file=sys.stderr)
        return 2
    except (ValueError, OSError, zerolite.ZeroliteError) as error:
        print(key.masked(f"zerolite generate: error: {error}"), file=sys.stderr)
        return 2
    except Exception:  # a fault of ours: told in full, less the key
        print(key.masked(traceback.format_exc()), file=sys.stderr)
        return 1


def generate(argv: list[str]) -> int:
    """Ask, write, tell. Raises ValueError for a mistake of the user."""
    for name in NEEDED:
        importlib.import_module(name)  # before anything is paid for
    given = parser().parse_args(argv)
    key = _checked(given, argv)
    plan, evaluation = _plan(given), read_conversations(given.evaluation_file) if given.evaluation_file else []
    filters = Filters(plan.seeds, evaluation)
    settings = Settings(
        given.model, given.max_new_tokens, given.temperature, given.response_format == "json_object",
        given.max_retries + 1, given.retry_wait, given.timeout,
    )  # fmt: skip
    requests = list(plan.requests(given.num_requests))
    print(NOTICE, file=sys.stderr)
    with Journal(given.output_dir, {"model": given.model, **plan.fingerprint()}) as journal:
        outcome, ledger = asyncio.run(_ask(given, plan, requests, settings, key, journal))
        found = result.collect(plan, requests, journal, filters, given.licence)
        if outcome.stopped:
            told = f"The run stopped: {outcome.stopped}."
        elif outcome.lost:
            told = f"{outcome.lost} requests have no answer; the same command asks them again."
        else:
            told = "Every request has its answer."
        names = ", ".join(file.name for file in given.evaluation_file)
        judged = f"Rows were compared with {names}." if names else "No evaluation file was given to compare with."
        card = result.card(plan, given.model, requests, journal, ledger, found, f"{told} {judged}")
        result.write(given.output_dir, found, card)
    print(card)
    if outcome.is_refused:
        raise ValueError(outcome.stopped)
    return int(bool(outcome.stopped or outcome.lost))


async def _ask(
    given, plan: Plan, requests, settings: Settings, key: keys.Key, journal: Journal
) -> tuple[Outcome, Ledger]:
    ledger = Ledger(given.price_in, given.price_out, given.max_cost, given.max_tokens_total)
    ledger.spent = journal.spent
    left = runner.pending(plan, requests, journal)
    told_at = time.monotonic()

    def tell(number: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= TELL_S or number == len(left):
            told_at = time.monotonic()
            print(f"{number} of {len(left)} requests answered, {ledger}", file=sys.stderr, flush=True)

    if not left:
        return Outcome(), ledger
    endpoint = Endpoint(settings, key, journal, ledger)
    return await runner.run(plan, left, endpoint, given.concurrency, tell), ledger


def _plan(given: argparse.Namespace) -> Plan:
    passages = read_passages(given.passage_file, given.licence)
    kinds = given.kinds or ["self_instruct", "dialogue", *(["passage"] if passages else [])]
    for name, values in (("--kinds", kinds), ("--languages", given.languages)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name}: names one twice")
    return Plan(given.seed, kinds, given.languages, read_conversations(given.seed_file), passages, given.prompts)


def _checked(given: argparse.Namespace, argv: list[str]) -> keys.Key:
    key = keys.from_environment()
    if key.is_in(" ".join(argv)):
        raise ValueError("the key stands on the command line, where everybody can read it: leave it in OPENAI_API_KEY")
    if not given.model:
        raise ValueError("--model is missing: the name of the model at the endpoint, or OPENAI_MODEL")
    if not os.environ.get("OPENAI_BASE_URL", "https://").startswith(("http://", "https://")):
        raise ValueError("OPENAI_BASE_URL: expected http://... or https://...")
    if given.max_cost is not None and not (given.price_in or given.price_out):
        raise ValueError("--max_cost needs --price_in and --price_out, the prices of a million tokens")
    if not (given.output_dir / NAME).exists() and (given.output_dir / result.ROWS).exists():
        raise ValueError(f"{given.output_dir} has {result.ROWS} of something else: name a new --output_dir")
    return key


if __name__ == "__main__":
    sys.exit(main())
