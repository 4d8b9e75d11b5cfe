"""`zerolite chat MODEL --web`: the dialogue as a page of Gradio, in English and Chinese, served to this machine.

Nothing goes to the network and nothing comes from it: no analytics, no share link, fonts and scripts of the package.
Answers are shown as plain text, for Markdown would change them: it strikes out what lies between the ~ of 3~5 and 2~3.
"""

import argparse
import html
import os
import re
import threading
from pathlib import Path

from zerolite.medqa import terminal
from zerolite.medqa.answers import NOTICE
from zerolite.medqa.desk import Desk, Dialogue, Said
from zerolite.medqa.images.files import FORMATS
from zerolite.medqa.opening import open_variants
from zerolite.medqa.terminal import NOTICES

SUFFIXES = [f".{name.lower()}" for name in (*FORMATS, "jpg", "tif")]  # of pictures, as the file chooser takes them
MAX_WAITING = 8  # pages whose question waits at the model; more wait in Gradio's queue
TAG_OR_ENTITY = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")  # no other < or &, for a copied text has what is escaped
LANGUAGES = [("English", "en"), ("中文", "zh")]
TEXTS = {
    "en": {
        "notice": f"{NOTICE} A language model writes these answers, and they may be wrong. In an emergency call your "
        "local emergency number; with questions about your health see a doctor.",
        "chat": "Dialogue",
        "empty": "Ask a question. The model answers from what it has learned, and knows nothing about you.",
        "ask": "Your question",
        "send": "Send",
        "stop": "Stop",
        "clear": "New dialogue",
        "settings": "Settings",
        "adapter": "Adapter",
        "none": "none (the base model)",
        "system": "System text",
        "system_info": "What the model is told before every dialogue. Another text begins a new dialogue.",
        "waits": "Waiting: {} before you.",
        "answers": "The model answers …",
        "stopped": "The answer was stopped.",
        "nothing": "The model ended its answer without a word.",
        "cut": "The answer was cut off after {} tokens (--max_new_tokens).",
        "new": "Other settings: the model has forgotten what was said before.",
        "error": "Error: {}",
        "turns": "Forgotten, since the model has no room for it: the oldest turns ({}).",
        "no_system": "The system text was left out: the model has no room for it.",
        "question_cut": "The beginning of the question was left out: the model has no room for it.",
    },
    "zh": {
        "notice": "以下回答不构成医疗建议。回答由语言模型生成，可能有误。"
        "紧急情况请立即拨打当地急救电话；健康问题请咨询医生。",
        "chat": "对话",
        "empty": "请输入问题。模型只根据训练所得作答，并不了解您的情况。",
        "ask": "您的问题",
        "send": "发送",
        "stop": "停止",
        "clear": "新对话",
        "settings": "设置",
        "adapter": "适配器",
        "none": "无（基座模型）",
        "system": "系统提示词",
        "system_info": "每次对话开始前告诉模型的内容。修改后将开始新的对话。",
        "waits": "排队中：前面还有 {} 个问题。",
        "answers": "模型正在回答……",
        "stopped": "回答已停止。",
        "nothing": "模型没有给出任何内容。",
        "cut": "回答在 {} 个 token 后被截断（--max_new_tokens）。",
        "new": "设置已更改：模型不再记得此前的对话。",
        "error": "出错了：{}",
        "turns": "模型容纳不下，已忘记最早的 {} 轮对话。",
        "no_system": "模型容纳不下，已略去系统提示词。",
        "question_cut": "模型容纳不下，已略去问题的开头。",
    },
}
CSS = """
#notice { position: sticky; top: 0; z-index: 20; padding: 0.5em 0.9em; border-radius: 6px;
          border-left: 5px solid #b45309; background: #fef3c7; color: #451a03; }
#notice > * { padding: 0; color: inherit; }
#head { align-items: center; flex-wrap: nowrap; }
#model { overflow-wrap: anywhere; flex-grow: 1; }
#language { flex-grow: 0; min-width: max-content !important; }
#language .wrap { flex-wrap: nowrap; }
#chat .placeholder-content, #chat [class*=placeholder] { padding: 0.4em 0.6em; }
#status, #status * { border-width: 0 !important; background: none !important; box-shadow: none !important; }
#send, #stop, #clear { white-space: nowrap; }
"""


def run(given: argparse.Namespace) -> None:
    """Serve the page of a command line until Ctrl-C.

    Raises ValueError for a mistake of the user, and where Gradio is not installed; OSError where the port is taken.
    """
    gradio = load()
    host = given.host or "127.0.0.1"
    if given.port is not None and not 0 < given.port < 65536:
        raise ValueError(f"--port {given.port}: expected 1 to 65535")
    terminal.say(NOTICES)
    variants = open_variants(
        given.model, given.adapter, given.base, given.tokenizer_name_or_path, given.template, given.precision
    )
    settings = terminal.settings_of(given)
    for variant in variants.values():
        settings.longest(variant.opened.room)
        terminal.say(f"{variant.opened.folder}: {variant.opened.told}")
    desk = Desk(variants, settings)
    blocks = page(gradio, desk, str(given.model), given.system)
    try:
        try:
            _, url, _ = launch(blocks, host, given.port)
        except OSError as error:
            where = f"{host}, port {given.port or 'from 7860 on'}"
            raise ValueError(f"{where}: cannot serve there, it is in use or no address of this machine") from error
        terminal.say(f"{url} (Ctrl-C ends it)")
        if host not in ("127.0.0.1", "localhost", "::1"):
            terminal.say(f"--host {host}: whoever reaches this port can ask the model; there is no password")
        wait()
    except KeyboardInterrupt:
        terminal.say("\nended")
    finally:
        desk.close()
        blocks.close(verbose=False)


def wait() -> None:
    """Until Ctrl-C."""
    threading.Event().wait()


def load():
    """Gradio, told to ask nobody; ValueError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio asks its own address whether it serves; a proxy of the environment would be asked instead.
    for variable in ("NO_PROXY", "no_proxy"):
        known = os.environ.get(variable, "")
        os.environ[variable] = ",".join(filter(None, [known, "127.0.0.1,localhost"]))
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ValueError(f"--web needs {error.name}: pip install 'zerolite[web]'") from error
    return gradio


def launch(blocks, host: str, port: int | None):
    """(app, URL, None): serves in the background; without a port, on the first free one from 7860."""
    return blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
        css=CSS,
    )


def page(gradio, desk: Desk, name: str, system: str = ""):
    """The page as `gradio.Blocks`."""
    blocks = gradio.Blocks(analytics_enabled=False, title=f"zerolite: {name}")
    has_choice = len(desk.variants) > 1

    def choices(language: str) -> list[tuple[str, str]]:
        return [(path or TEXTS[language]["none"], path or "") for path in desk.variants]

    with blocks:
        dialogue, shown = gradio.State(), gradio.State([])
        with gradio.Row(elem_id="head"):
            gradio.Markdown(f"### {name}", elem_id="model")
            language = gradio.Radio(LANGUAGES, value="en", show_label=False, container=False, elem_id="language")
        notice = gradio.HTML(NOTICES, elem_id="notice")  # in the page's language as soon as that is known
        chat = gradio.Chatbot(
            scale=1,
            height="56dvh",
            min_height=220,
            show_label=False,
            render_markdown=False,
            buttons=["copy"],
            elem_id="chat",
        )
        status = gradio.Textbox(show_label=False, container=False, interactive=False, elem_id="status", max_lines=3)
        with gradio.Row():
            box, own = gradio.Textbox, {}
            if desk.is_seeing:  # pictures are the files themselves; a gradio.Image would decode and write them again
                box = gradio.MultimodalTextbox
                own = {"file_count": "multiple", "file_types": SUFFIXES, "submit_btn": False}
            question = box(
                scale=8, lines=1, max_lines=6, autofocus=True, show_label=False, container=False, elem_id="ask", **own
            )
            send = gradio.Button(variant="primary", scale=1, min_width=90, elem_id="send")
            stop = gradio.Button(variant="stop", scale=1, min_width=90, visible=False, elem_id="stop")
            clear = gradio.Button(scale=1, min_width=130, elem_id="clear")
        with gradio.Accordion(open=False, elem_id="settings") as settings:
            adapter = gradio.Dropdown(choices("en"), value=desk.first or "", visible=has_choice, elem_id="adapter")
            system_text = gradio.Textbox(value=system, lines=2, max_lines=8, elem_id="system")

        def labels(language: str) -> list:
            texts = TEXTS[language]
            return [
                gradio.update(value=texts["notice"]),
                gradio.update(label=texts["chat"], placeholder=texts["empty"]),
                gradio.update(placeholder=texts["ask"]),
                gradio.update(value=texts["send"]),
                gradio.update(value=texts["stop"]),
                gradio.update(value=texts["clear"]),
                gradio.update(label=texts["settings"]),
                gradio.update(label=texts["adapter"], choices=choices(language)),
                gradio.update(label=texts["system"], info=texts["system_info"]),
            ]

        def begin(request: gradio.Request) -> list:
            """In the language of the browser."""
            asked = request.headers.get("accept-language", "")
            found = "zh" if asked.lower().startswith("zh") else "en"
            return [found, *labels(found)]

        def answer(
            question: str | dict,
            adapter: str,
            system: str,
            language: str,
            dialogue: Dialogue | None,
            shown: list,
            request: gradio.Request,
        ):
            """Streams into the page; the settings are those of the moment at which the question was sent."""
            text, files = parts_of(question)
            if not text.strip():
                yield {}
                return
            dialogue = Dialogue() if dialogue is None else dialogue
            asked = [*({"path": str(path)} for path in files), plain(text.strip())]
            before = [*shown, *({"role": "user", "content": content} for content in asked)]
            empty = None if desk.is_seeing else ""
            cleared = {"question": empty, "send": gradio.update(visible=False), "stop": gradio.update(visible=True)}
            for said in desk.answer(request.session_hash, dialogue, adapter or None, system, text, files):
                shown = [*before, {"role": "assistant", "content": plain(said.text)}] if said.text else before
                yield updates(chat=shown, status=told(said, language), **cleared)
                cleared = {}
            yield updates(
                shown=shown, dialogue=dialogue, send=gradio.update(visible=True), stop=gradio.update(visible=False)
            )

        def updates(**values) -> dict:
            components = {
                "chat": chat, "status": status, "question": question, "send": send, "stop": stop, "shown": shown,
                "dialogue": dialogue,
            }  # fmt: skip
            return {components[name]: value for name, value in values.items()}

        def end(request: gradio.Request) -> None:
            desk.stop(request.session_hash)

        def forget() -> list:
            return [None, [], [], ""]

        texts = [notice, chat, question, send, stop, clear, settings, adapter, system_text]
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "undocumented"}
        blocks.load(begin, None, [language, *texts], api_name="begin", **quick)
        language.change(labels, language, texts, api_name="labels", **quick)
        gradio.on(
            [question.submit, send.click],
            answer,
            [question, adapter, system_text, language, dialogue, shown],
            [chat, status, question, send, stop, shown, dialogue],
            trigger_mode="once",
            concurrency_limit=MAX_WAITING,
            show_progress="hidden",
            api_name="answer",
            api_visibility="undocumented",
        )
        stop.click(end, None, None, api_name="stop", **quick)
        gradio.on([clear.click, chat.clear], forget, None, [dialogue, shown, chat, status], api_name="forget", **quick)
    return blocks


def parts_of(question: str | dict | None) -> tuple[str, list[Path]]:
    """(text, files) of what a page sends; where the model reads texts alone it is a text."""
    if not isinstance(question, dict):
        return question or "", []
    return question.get("text") or "", [Path(path) for path in question.get("files") or ()]


def plain(text: str) -> str:
    """For the dialogue, which shows HTML also where it renders no Markdown: an image there would be fetched."""
    return TAG_OR_ENTITY.sub(lambda found: html.escape(found[0]), text)


def told(said: Said, language: str) -> str:
    """The state of an answer in words."""
    texts, lost = TEXTS[language], said.prompt
    lines = [texts["new"]] if said.is_new_dialogue else []
    if said.error:
        lines.append(texts["error"].format(said.error))
    elif said.is_stopped:
        lines.append(texts["stopped"])
    elif lost is None:
        lines.append(texts["waits"].format(said.num_before) if said.num_before else texts["answers"])
    else:
        lines += [texts["turns"].format(lost.num_turns_lost)] if lost.num_turns_lost else []
        lines += [texts["no_system"]] if lost.is_system_lost else []
        lines += [texts["question_cut"]] if lost.is_question_cut else []
        lines += [] if said.text.strip() else [texts["nothing"]]
        lines += [texts["cut"].format(said.limit)] if said.limit else []
    return "\n".join(lines)
