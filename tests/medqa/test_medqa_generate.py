"""What does `zerolite generate` do about each fault of an endpoint, each mistake of a user, each kind of answer?"""

from __future__ import annotations

import asyncio
import email.utils
import json
import sys
import time
from dataclasses import replace

import pytest
from odd_endpoint import KEY, Endpoint

from zerolite import cli
from zerolite.medqa.generate import endpoint, keys, plan, prompts, replies, result, runner
from zerolite.medqa.generate.filters import Filters, is_in_language
from zerolite.medqa.generate.journal import Answer, Journal
from zerolite.medqa.generate.ledger import CeilingReached, Ledger, Tokens
from zerolite.medqa.rows import Conversation

DAY = time.time() + 86400


@pytest.fixture
def server(monkeypatch):
    with Endpoint(7, fault_rate=0, seconds=0) as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("OPENAI_MODEL", raising=False)
        yield found


def generate(tmp_path, *options) -> int:
    given = ["--output_dir", str(tmp_path / "out"), "--model", "odd", "--concurrency", "1", "--retry_wait", "0.01"]
    return cli.main(["generate", *given, "--timeout", "3", *map(str, options)])


def rows_of(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text(encoding="utf-8").splitlines()]


# --- the endpoint ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ({1: "429", 2: "500", 3: "503 after 0.1", 4: "hang", 5: "close", 6: "html", 7: "echo"}, 0),
        ({1: "400 max_tokens: use max_completion_tokens"}, 0),
        ({1: "400 context too long"}, 1),
        (dict.fromkeys(range(1, 9), "500"), 1),
        ({1: "404"}, 2),
        ({1: "403"}, 2),
        ({1: "429 after 7200"}, 2),
        ({1: f"429 after {email.utils.formatdate(DAY, usegmt=True)}"}, 2),
    ],
)
def test_what_passes_is_asked_again_and_what_does_not_is_told(server, tmp_path, capsys, script, expected):
    server.script = script
    assert generate(tmp_path, "--num_requests", 1) == expected
    out, err = capsys.readouterr()
    asked = server.attempts.total()
    assert asked == (len(script) + 1 if expected == 0 else len(script))
    if expected == 1:
        assert "requests have no answer" in out and ("context too long" in out or "500" in out)
        server.script = {}
        assert generate(tmp_path, "--num_requests", 1) == 0  # the same command asks again
        assert server.attempts.total() == asked + 1
    elif expected == 2:
        assert "zerolite generate: error: " in err and ("refuses" in err or "asks to wait" in err)
    assert not any(KEY[start : start + 8] in out + err for start in range(len(KEY) - 7))


def test_waits_are_those_of_retry_after_or_doubled():
    def wait(attempt: int, after: float | None) -> float:
        error = endpoint.Failed("", is_final=False, retry_after=after)

        class State:
            attempt_number = attempt
            outcome = type("Outcome", (), {"exception": lambda self: error})()

        return endpoint._wait(1.0)(State)

    for attempt in range(1, 12):
        assert 0.5 * min(60, 2 ** (attempt - 1)) <= wait(attempt, None) <= 1.5 * min(60, 2 ** (attempt - 1))
        assert 30 <= wait(attempt, 30.0) <= 31 and wait(attempt, 0.0) == 0
    assert len({wait(3, None) for _ in range(5)}) == 5  # not all at the same moment
    assert endpoint.seconds_of({"retry-after": "1.5"}) == 1.5
    assert endpoint.seconds_of({"retry-after-ms": "300", "retry-after": "1"}) == 0.3
    tomorrow = email.utils.formatdate(time.time() + 86400, usegmt=True)
    assert 86000 < endpoint.seconds_of({"retry-after": tomorrow}) <= 86401
    assert endpoint.seconds_of({"retry-after": "soon"}) is None and endpoint.seconds_of({}) is None


def test_after_ten_requests_without_an_answer_nobody_is_asked(server, tmp_path, capsys):
    server.script = dict.fromkeys(range(1, 100), "500")
    assert generate(tmp_path, "--num_requests", 50, "--max_retries", 1) == 1
    assert server.attempts.total() == 2 * runner.MOST_LOST and len(server.attempts) == runner.MOST_LOST
    assert "The run stopped: the last 10 requests have no answer" in capsys.readouterr().out


def test_the_ledger_waits_for_what_is_in_flight_and_never_goes_beyond():
    async def scenario() -> list[str]:
        ledger, events = Ledger(1.0, 2.0, None, 100), []

        async def request(name: str, used: int) -> None:
            try:
                await ledger.reserve(Tokens(30, 30))
            except CeilingReached as reached:
                events.append(f"{name} {str(reached).partition(':')[0]}")
                return
            events.append(name)
            assert (ledger.spent + ledger.reserved).total <= 100
            await asyncio.sleep(0)
            await ledger.settle(Tokens(30, 30), Tokens(used, 0))

        await asyncio.gather(*(request(name, used) for name, used in (("a", 10), ("b", 30), ("c", 5), ("d", 60))))
        return events

    assert asyncio.run(scenario()) == ["a", "b", "c", "d the ceiling of 100 tokens is reached"]
    ledger = Ledger(1.0, 2.0, 1e-4, None)
    assert ledger.fits(Tokens(40, 30)) and not ledger.fits(Tokens(40, 31))
    assert ledger.cost(Tokens(10, 20)) == pytest.approx(5e-5)


# --- answers --------------------------------------------------------------------------------------------------------

PASSAGE = plan.Passage("p.txt, line 1", "Gout is caused by crystals. It hurts at night.", "p.txt", "MIT", "en")
PROMPT = prompts.load("passage", "en", None)
REQUEST = plan.Request("000000-self_instruct-en", "self_instruct", "en", (), PROMPT, ("seed 1",))
GOOD = '{"items": [{"question": "What is gout?", "answer": "Crystals in a joint."}], "complete": true}'


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        (GOOD, "stop", None),
        (f"<think>hm {{</think>\n```json\n{GOOD}\n```", "stop", None),
        (GOOD.replace(', "complete": true', ""), "stop", None),  # it parses, so it is whole
        (GOOD.replace("true}", "true,}"), "stop", None),
        (GOOD.replace('"', "'"), "stop", None),
        ("Here it is: " + GOOD + " Good luck!", "stop", None),
        (GOOD, "length", replies.CUT_OFF),
        (GOOD[:60], "length", replies.CUT_OFF),
        (GOOD[:60], "stop", replies.CUT_OFF),
        (GOOD[:75], "stop", replies.CUT_OFF),
        (GOOD.partition("]")[0], "stop", replies.CUT_OFF),
        (GOOD, "content_filter", replies.REFUSED),
        (GOOD, "refusal", replies.REFUSED),
        ("", "key", replies.HOLDS_KEY),
        ("I\u2019m sorry, but I can\u2019t assist with that.", "stop", replies.REFUSED),
        ("抱歉，我无法回答这个问题。", "stop", replies.REFUSED),
        ("Sure.", "stop", replies.MALFORMED),
        ("", "stop", replies.MALFORMED),
        ("[" * 5000, "stop", replies.MALFORMED),
        ('{"items": []}', "stop", replies.MALFORMED),
        ('{"items": {"question": "a"}}', "stop", replies.MALFORMED),
    ],
)
def test_an_answer_has_items_or_a_reason(text, finish, expected):
    found = replies.items(REQUEST, Answer(REQUEST.id, text, finish, Tokens(), "m", ""))
    if expected is None:
        assert [item.conversation for item in found] == [Conversation((("What is gout?", "Crystals in a joint."),))]
    else:
        assert found == expected


def test_a_refusal_among_the_items_of_repaired_json_costs_no_other_item():
    refused = '{"question": "Why?", "answer": "I am sorry, but I cannot help."}, '
    text = GOOD.replace("[", "[" + refused).replace("true}", "true,}")
    found = replies.items(REQUEST, Answer(REQUEST.id, text, "stop", Tokens(), "m", ""))
    assert [item.conversation.turns[0][0] for item in found] == ["Why?", "What is gout?"]


@pytest.mark.parametrize(
    ("item", "kind", "reason"),
    [
        ({"question": "Why?", "answer": "So.", "evidence": "GOUT is caused by — crystals"}, "passage", ""),
        (
            {"question": "Why?", "answer": "So.", "evidence": "Gout is caused by crystal"},
            "passage",
            replies.NO_EVIDENCE,
        ),
        ({"question": "Why?", "answer": "So.", "evidence": "night"}, "passage", replies.NO_EVIDENCE),
        ({"question": "Why?", "answer": "So."}, "passage", replies.MALFORMED_ITEM),
        ({"question": "Why?", "answer": ["So."]}, "self_instruct", replies.MALFORMED_ITEM),
        ({"question": "Why?", "answer": " \u200b"}, "self_instruct", replies.MALFORMED_ITEM),
        ("Why?", "self_instruct", replies.MALFORMED_ITEM),
        ({"turns": [{"patient": "Why?", "doctor": "So."}]}, "dialogue", ""),
        ({"turns": [{"patient": "Why?"}]}, "dialogue", replies.MALFORMED_ITEM),
        ({"turns": ["Why?"]}, "dialogue", replies.MALFORMED_ITEM),
    ],
)
def test_an_item_has_its_texts_and_its_evidence(item, kind, reason):
    request = replace(REQUEST, kind=kind, passage=PASSAGE if kind == "passage" else None)
    text = json.dumps({"items": [item]})
    (found,) = replies.items(request, Answer(request.id, text, "stop", Tokens(), "m", ""))
    assert found.reason == reason and (found.conversation is None) == bool(reason)


def one(question: str, answer: str) -> Conversation:
    return Conversation(((question, answer),))


def test_filters_name_what_they_drop():
    seeds = [one("What is the difference between a cold and the flu?", "Both are infections.")]
    evaluation = [one("Which vitamin is missing in a person with scurvy and bleeding gums?", "It is vitamin C.")]
    told = "Collagen needs vitamin C, and without it the walls of small vessels break and gums begin to bleed."
    evaluation.append(one("Why?", told))
    filters = Filters(seeds, evaluation)
    answer = "It is a disease of the joints, and it hurts."
    cases = [
        (one("What is gout?", answer), "en", None),
        (one("What is gout?", answer), "en", "an exact duplicate"),
        (one("What is gout then?", answer + " Very much."), "en", "a near duplicate of a row"),
        (one("What is the difference between a cold and flu?", answer), "en", "a near duplicate of a seed task"),
        (one("Which vitamin is missing in someone with scurvy and bleeding gums?", answer), "en",
         "a near duplicate of an evaluation question"),
        (one("Is it true?", "It reads: which VITAMIN is missing in a person with scurvy and bleeding gums, who asks?"),
         "en", None),  # of eleven words
        (one("Is that so?", f"Yes: {told.lower()}"), "en", "shares a passage with the evaluation set"),
        (one("痛风怎么治疗？", "痛风是一种关节疾病，会引起疼痛。"), "en", "not in the language that was asked for"),
        (one("痛风怎么治疗？", "痛风是一种关节疾病，会引起疼痛。"), "zh", None),
        (one("痛风怎么办？", answer), "zh", "not in the language that was asked for"),
        (one("¿Qué es la gota?", "Es una enfermedad de las articulaciones que causa mucho dolor en el pie."), "en",
         "not in the language that was asked for"),
        (one("How are you?", "Fine."), "en", "too short"),
        (one("How is asthma treated?", "word " * 1300), "en", "too long"),
        (one("How is asthma treated?", "As an AI language model I have no opinion on it."), "en", "a refusal"),
        (one("How is a burn cooled?", "I'm sorry to hear that; cool it with water, not with ice."), "en", None),
    ]  # fmt: skip
    assert [filters.reason(row, language, "self_instruct") for row, language, _ in cases] == [case[2] for case in cases]
    assert filters.reason(one("May I run?", "Yes, you may run again."), "en", "dialogue") == "a dialogue of one turn"
    assert is_in_language("", "en") and not is_in_language("", "zh")


def test_passages_are_asked_of_checked_and_told_in_each_row(server, tmp_path, capsys):
    texts = [{"text": "Gout is caused by crystals.\nIt hurts at night.", "source": "A book", "licence": "MIT"}] * 3
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, texts)))
    options = ["--passage_file", tmp_path / "p.jsonl", "--kinds", "passage", "--num_requests", 12, "--languages", "en"]
    assert generate(tmp_path, *options) == 0
    rows, card = rows_of(tmp_path), capsys.readouterr().out
    assert len(server.good) > 3 and server.good <= {row["messages"][0]["content"] for row in rows}
    assert "not supported by its passage" in card and "A book | MIT" in card
    assert rows[0]["source"] == "A book" and rows[0]["licence"] == "MIT" and rows[0]["language"] == "en"
    said = rows[0]["provenance"]
    assert said["made_of"][0].startswith("p.jsonl, line ") and said["model"] == "odd-1" and said["date"][:2] == "20"
    assert said["prompt"] == "passage.en.md" and said["prompt_sha256"] == PROMPT.digest
    assert f"{said['request']}-{said['item']}" == rows[0]["id"] and said["request"] in server.paid


# --- the plan and the folder ----------------------------------------------------------------------------------------


def a_plan(**options) -> plan.Plan:
    seeds = plan.read_conversations([plan.SHIPPED_SEEDS])
    return plan.Plan(**{"seed": 0, "kinds": ["self_instruct", "dialogue"], "languages": ["en", "zh"], "seeds": seeds,
                        "passages": [], "prompts": None, **options})  # fmt: skip


def test_requests_depend_on_the_seed_alone_and_a_longer_plan_begins_as_the_shorter():
    requests = list(a_plan().requests(40))
    assert requests == list(a_plan().requests(60))[:40] and requests != list(a_plan(seed=1).requests(40))
    assert len({request.id for request in requests}) == 40
    assert [request.id[7:] for request in requests[:5]] == [
        "self_instruct-en", "dialogue-en", "self_instruct-zh", "dialogue-zh", "self_instruct-en",
    ]  # fmt: skip
    for request in requests:
        text = request.messages[-1]["content"]
        assert "$" not in text and "complete" in text and request.messages[0]["role"] == "system"


def test_long_texts_are_cut_into_passages_at_their_sentences(tmp_path):
    sentences = [f"Sentence {number} tells something about health." for number in range(900)]
    (tmp_path / "a.txt").write_text(" ".join(sentences[:500]) + "\n\n" + "。".join(["饮食要清淡"] * 30))
    found = plan.read_passages([tmp_path / "a.txt"], "MIT")
    assert found[0].language == "en" and {passage.licence for passage in found} == {"MIT"}
    assert all(len(plan.tokens_of(passage.text)) <= plan.LONGEST_PASSAGE for passage in found) and len(found) >= 3
    joined = "".join("".join(passage.text for passage in found).split())
    assert joined == "".join((tmp_path / "a.txt").read_text().split())


def test_a_journal_is_of_one_run_and_one_plan_and_its_torn_end_is_no_line(tmp_path):
    with Journal(tmp_path, {"seed": 0}) as journal:
        with pytest.raises(ValueError, match="another run is writing it"):
            Journal(tmp_path, {"seed": 0})
        journal.sent("a", Tokens(10, 20))
        journal.sent("b", Tokens(10, 20))
        journal.add(Answer("a", "é\u2028", "stop", Tokens(7, 8), "m", "now"))
        journal.sent("c", Tokens(1, 1))
        journal.lose("c", "500", Tokens())
    whole = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(whole + b'{"kind": "answer", "id": "b", "te')
    with Journal(tmp_path, {"seed": 0}) as journal:
        assert journal.answers["a"].text == "é\u2028" and journal.lost == {"c": "500"}
        assert journal.spent == Tokens(17, 28) and journal.num_interrupted == 1
    assert (tmp_path / "journal.jsonl").read_bytes() == whole
    with pytest.raises(ValueError, match="another plan: seed was 0 and is 1; name a new --output_dir"):
        Journal(tmp_path, {"seed": 1})
    (tmp_path / "journal.jsonl").write_bytes(whole.replace(b'"kind": "lost"', b'"kind": 5 "lost"'))
    with pytest.raises(ValueError, match="line 6: is no line of a journal"):
        Journal(tmp_path, {"seed": 0})


def test_prompts_of_a_folder_take_the_place_of_the_shipped_ones(tmp_path):
    (tmp_path / "dialogue.zh.md").write_text("# user\n${count} $examples $$", encoding="utf-8")
    found = prompts.load("dialogue", "zh", tmp_path)
    assert found.messages(count="1", examples="x") == ({"role": "user", "content": "1 x $"},)
    assert prompts.load("dialogue", "en", tmp_path).digest == prompts.load("dialogue", "en", None).digest
    wrong = [
        ("x", "expected `# system`"),
        ("# user\n$count $ x", "begins no word"),
        ("# user\n$count $examples $x", "has \\$x"),
        ("# user\n$count", "lacks \\$examples"),
    ]
    for text, words in wrong:
        (tmp_path / "dialogue.zh.md").write_text(text)
        with pytest.raises(ValueError, match=words):
            prompts.load("dialogue", "zh", tmp_path)


MISTAKES = [
    ((), {"OPENAI_API_KEY": ""}, "OPENAI_API_KEY is not set"),
    ((), {"OPENAI_API_KEY": "a b"}, "expected printable ASCII"),
    ((), {"OPENAI_BASE_URL": "localhost:80"}, "OPENAI_BASE_URL: expected http"),
    (("--model", ""), {}, "--model is missing"),
    (("--model", KEY), {}, "the key stands on the command line"),
    (("--max_cost", "1"), {}, "--max_cost needs --price_in"),
    (("--num_requests", "0"), {}, "expected a number from 1, got 0"),
    (("--kinds", "passage"), {}, "needs --passage_file"),
    (("--kinds", "dialogue", "dialogue"), {}, "names one twice"),
    (("--seed_file", "nowhere.jsonl"), {}, "nowhere.jsonl"),
    (("--passage_file", "nowhere.txt"), {}, "nowhere.txt"),
    (("--evaluation_file", "nowhere.jsonl"), {}, "nowhere.jsonl"),
    (("--prompts", "nowhere"), {}, "there is no such folder"),
    (("--frobnicate",), {}, "unrecognized arguments"),
]


@pytest.mark.parametrize(("options", "environment", "words"), MISTAKES, ids=[case[2] for case in MISTAKES])
def test_mistakes_are_named_with_status_2_and_nothing_is_asked(
    server, tmp_path, monkeypatch, capsys, options, environment, words
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert generate(tmp_path, *options) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and KEY not in err
    assert not server.attempts and not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_named_with_the_extra(server, tmp_path, monkeypatch, capsys):
    for name, imported in (("openai", "openai"), ("json_repair", "json_repair"), ("datasketch", "datasketch")):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, imported, None)
            assert generate(tmp_path) == 2
        err = capsys.readouterr().err
        assert name in err and "pip install 'zerolite[generate]'" in err
    assert not server.attempts


# --- the key --------------------------------------------------------------------------------------------------------


def test_a_key_and_its_parts_are_masked():
    key = keys.Key(KEY)
    assert KEY not in repr(key) and KEY not in str(key)
    for text in (KEY, f"a{KEY}b{KEY}", KEY[3:], KEY[:-3], KEY[5:13]):
        masked = key.masked(f"say {text}!")
        assert masked.startswith("say ") and len(masked) == len(text) + 5 and key.is_in(text)
        assert not any(KEY[start : start + 8] in masked for start in range(len(KEY) - 7))
    assert key.masked("nothing of it") == "nothing of it" and not key.is_in(KEY[:7])
    assert keys.Key("none").masked("none here") == "**** here" and not keys.Key("none").is_in("none here")


def test_a_fault_of_ours_is_told_without_the_key(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(result, "collect", lambda *_: (_ for _ in ()).throw(RuntimeError(f"no {KEY}")))
    assert generate(tmp_path, "--num_requests", 1) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "RuntimeError: no ****" in err and KEY[:8] not in err
