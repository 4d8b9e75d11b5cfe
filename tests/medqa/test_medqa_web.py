"""Does the page of `zerolite chat --web` show streamed answers in its language, and ask nothing of the network?"""

from __future__ import annotations

import re
import sys
import urllib.request

import pytest
from limits import load
from medqa_runs import write_talker

from zerolite import cli
from zerolite.medqa import desk, generation, opening, web
from zerolite.medqa.answers import NOTICE
from zerolite.medqa.data import Conversation

CHINESE = "感冒了应该怎么办？"
SETTINGS = generation.Settings(max_new_tokens=12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def asked(base):
    made = desk.Desk(opening.open_variants(base, []), SETTINGS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def served(asked):
    """A page that is served, and where."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'zerolite[web]'")
    blocks = web.page(web.load(), asked, "talker")
    _, url, _ = web.launch(blocks, "127.0.0.1", None)
    yield blocks, url
    blocks.close(verbose=False)


@pytest.fixture
def client(served):
    from gradio_client import Client

    client = Client(served[1], verbose=False, analytics_enabled=False)
    yield client
    client.close()


def ask(client, question: str, language: str) -> list[tuple[str, str, str]]:
    """(question, answer, status) as the page has them, one after the other."""
    job = client.submit(question, "", "", language, api_name="/answer")
    job.result(timeout=120 * load())
    seen = []
    for chat, status, *_ in job.outputs():
        if isinstance(chat, list):
            texts = {one["role"]: "".join(part["text"] for part in one["content"]) for one in chat}
            seen.append((texts.get("user", ""), texts.get("assistant", ""), status))
    return seen


def test_a_chinese_question_is_answered_in_parts_that_add_up(client, base):
    seen = ask(client, CHINESE, "zh")
    whole = generation.reply(opening.open_model(base), Conversation(((CHINESE, ""),)), SETTINGS).text
    answers = [answer for _, answer, _ in seen if answer]
    assert answers[-1] == whole and len(answers) > 3
    assert all(after.startswith(before) for before, after in zip(answers, answers[1:], strict=False))
    assert seen[0][0] == CHINESE and seen[0][2] == web.TEXTS["zh"]["answers"]
    assert seen[-1][2] == web.TEXTS["zh"]["cut"].format(12)


def test_the_languages_say_the_same_and_the_notice_is_always_there(client, served):
    blocks, url = served
    assert web.TEXTS["en"].keys() == web.TEXTS["zh"].keys()
    for key, text in web.TEXTS["en"].items():
        assert text.count("{}") == web.TEXTS["zh"][key].count("{}"), key
    assert NOTICE in web.TEXTS["en"]["notice"] and "不构成医疗建议" in web.TEXTS["zh"]["notice"]
    for language in ("en", "zh"):
        labels = client.predict(language, api_name="/labels")
        assert labels[0]["value"] == web.TEXTS[language]["notice"]
    (notice,) = [one for one in blocks.blocks.values() if getattr(one, "elem_id", None) == "notice"]
    assert notice.visible and not any(
        notice in fn.outputs and fn.api_name in ("answer", "forget") for fn in blocks.fns.values()
    )


@pytest.mark.parametrize(("browser", "language"), [("zh-CN,zh;q=0.9", "zh"), ("de,en;q=0.7", "en"), ("", "en")])
def test_a_page_begins_in_the_language_of_the_browser(browser, language, served):
    from gradio_client import Client

    client = Client(served[1], verbose=False, analytics_enabled=False, headers={"Accept-Language": browser})
    chosen, notice, *_ = client.predict(api_name="/begin")
    assert chosen == language and notice["value"] == web.TEXTS[language]["notice"]
    client.close()


def test_the_page_loads_nothing_from_elsewhere_and_serves_this_machine_alone(served):
    blocks, url = served
    assert url.startswith("http://127.0.0.1:") and blocks.server_name == "127.0.0.1"
    assert not blocks.share and not blocks.analytics_enabled and not blocks.enable_monitoring
    for path in ("", "theme.css"):
        with urllib.request.urlopen(url + path) as answer:
            text = answer.read().decode()
        loaded = re.findall(
            r"""(?:src|href)=["']?(https?:[^"'> ]+)|url\(["']?(https?:[^"')]+)|@import[^;]*https?:""", text
        )
        assert not loaded, (path, loaded)


def test_an_error_of_the_model_is_shown_and_the_next_question_is_answered(client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(desk, "replies", lambda *_: 1 / 0)
        assert "出错了：ZeroDivisionError" in ask(client, CHINESE, "zh")[-1][2]
    assert ask(client, CHINESE, "zh")[-1][1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3~5 天，每日 2~3 次；p < 0.05 & x<5", "3~5 天，每日 2~3 次；p < 0.05 & x<5"),
        ("<img src=x> </b><!-- -->", "&lt;img src=x> &lt;/b>&lt;!-- -->"),
        ("&lt;b&gt; &#60; AT&T", "&amp;lt;b&amp;gt; &amp;#60; AT&T"),
    ],
)
def test_what_a_model_writes_is_no_html_of_the_page(text, expected):
    assert web.plain(text) == expected


def test_without_gradio_the_extra_is_named_before_a_model_is_read(base, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(opening, "open_model", lambda *_: pytest.fail("read"))
    assert cli.main(["chat", str(base), "--web"]) == 2
    assert "pip install 'zerolite[web]'" in capsys.readouterr().err
    assert cli.main(["chat", str(base), "--adapter", "a"]) == 2
    assert f"zerolite chat a --base {base}" in capsys.readouterr().err
    assert cli.main(["chat", str(base), "--port", "80"]) == 2 and "--web" in capsys.readouterr().err
