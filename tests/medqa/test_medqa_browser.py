"""Does someone in a real browser, Chinese or English, wide or narrow, get a streamed answer under the notice?

Slow; it needs Debian's chromium and `pip install playwright`. ZEROLITE_SCREENSHOTS=folder keeps pictures.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from limits import load
from medqa_runs import write_talker
from PIL import Image
from seeing_models import write_seer

from zerolite.medqa import desk, generation, opening, web

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium fonts-noto-cjk"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(desk, URL) of a model with long answers; ZEROLITE_BROWSER_MODEL names a folder of a real one."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'zerolite[web]'")
    named = os.environ.get("ZEROLITE_BROWSER_MODEL")
    base = Path(named) if named else write_talker(tmp_path_factory.mktemp("base"))
    put = desk.StoppableStream.put

    def slow(stream, value) -> None:
        time.sleep(0.1)  # a reader sees a tiny model's answer come, too
        put(stream, value)

    desk.StoppableStream.put = slow
    made = desk.Desk(opening.open_variants(base, []), generation.Settings(max_new_tokens=40))
    blocks = web.page(web.load(), made, base.name)
    _, url, _ = web.launch(blocks, "127.0.0.1", None)
    yield made, url
    desk.StoppableStream.put = put
    made.close()
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def picture(page, name: str) -> None:
    if folder := os.environ.get("ZEROLITE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    ("locale", "language", "question"),
    [("zh-CN", "zh", "感冒了应该怎么办？"), ("en-US", "en", "What helps against a dry cough?")],
)
def test_a_question_is_asked_and_its_answer_read_as_it_comes(served, chromium, locale, language, question, width):
    made, url = served
    texts, name = web.TEXTS[language], f"{language}-{width}"
    context = chromium.new_context(locale=locale, viewport={"width": width, "height": 800})
    context.set_default_timeout(15_000 * load())
    page, foreign, failed = context.new_page(), [], []
    page.on("request", lambda request: foreign.append(request.url) if not request.url.startswith(url) else None)
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(url)
    page.get_by_text(texts["notice"]).wait_for()
    picture(page, f"{name}-begin")

    page.get_by_placeholder(texts["ask"]).fill(question)
    page.keyboard.press("Enter")
    page.get_by_role("button", name=texts["stop"]).wait_for()
    answer, seen = page.locator("#chat .bot .message-content, #chat .bot .message").first, set()
    answer.wait_for()
    while page.get_by_role("button", name=texts["stop"]).is_visible():
        seen.add(answer.inner_text().strip())
        if len(seen) == 3:
            picture(page, f"{name}-stream")
        page.wait_for_timeout(20)
    whole = answer.inner_text().strip()
    assert whole and len(seen - {"", whole}) >= 2 and all(whole.startswith(part) for part in seen)
    *_, expected = made.answer("expected", desk.Dialogue(), None, "", question)
    assert " ".join(whole.split()) == " ".join(expected.text.split())
    assert page.get_by_text(texts["notice"]).is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing is cut off at the side
    assert page.locator("#chat").bounding_box()["height"] < 0.6 * 800  # long answers scroll inside
    picture(page, f"{name}-answer")

    page.get_by_placeholder(texts["ask"]).fill(question)
    page.get_by_role("button", name=texts["send"]).click()
    page.get_by_role("button", name=texts["stop"]).click()
    page.get_by_role("button", name=texts["send"]).wait_for()
    assert page.locator("#status textarea").input_value() in (texts["stopped"], texts["cut"].format(40), "")
    other = "en" if language == "zh" else "zh"
    page.get_by_text({"en": "English", "zh": "中文"}[other], exact=True).click()
    page.get_by_text(web.TEXTS[other]["notice"]).wait_for()
    page.get_by_role("button", name=web.TEXTS[other]["clear"]).click()
    page.get_by_text(web.TEXTS[other]["empty"]).wait_for()
    picture(page, f"{name}-other")
    assert not foreign and not failed
    context.close()


def test_a_picture_is_sent_with_its_question(chromium, tmp_path):
    """Chosen from files, shown beside the question, and read: the answer is the one that the desk gives with it."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'zerolite[web]'")
    image = tmp_path / "square.png"
    Image.new("RGB", (24, 24), (200, 30, 30)).save(image)
    made = desk.Desk(
        opening.open_variants(write_seer(tmp_path / "seer", "qwen2_vl"), []), generation.Settings(max_new_tokens=8)
    )
    blocks = web.page(web.load(), made, "seer")
    _, url, _ = web.launch(blocks, "127.0.0.1", None)
    try:
        context = chromium.new_context(locale="en-US", viewport={"width": 1000, "height": 800})
        context.set_default_timeout(15_000 * load())
        page = context.new_page()
        page.goto(url)
        page.get_by_text(web.TEXTS["en"]["notice"]).wait_for()
        page.locator("input[type=file]").first.set_input_files(image)
        page.locator("img[src*='square.png']").first.wait_for()
        picture(page, "image-chosen")
        page.get_by_placeholder(web.TEXTS["en"]["ask"]).fill("What colour is it?")
        page.keyboard.press("Enter")
        page.locator("#chat .user img").first.wait_for()
        answer = page.locator("#chat .bot .message-content, #chat .bot .message").first
        answer.wait_for()
        page.get_by_role("button", name=web.TEXTS["en"]["stop"]).wait_for(state="hidden")
        picture(page, "image-answered")
        *_, expected = made.answer("expected", desk.Dialogue(), None, "", "What colour is it?", [image])
        assert expected.text.strip() and " ".join(answer.inner_text().split()) == " ".join(expected.text.split())
        context.close()
    finally:
        made.close()
        blocks.close(verbose=False)
