"""An OpenAI-compatible server on this machine that misbehaves by a script, and keeps count of what it was paid for.

What it does depends on its seed and the id of a request: how often it fails before it answers, and what it then says.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from zerolite.medqa.generate.ledger import Tokens

KEY = "sk-planted-4fZq81Lx0TtR7uVw2YbN9cEd"
SLOW_S = 30.0  # nobody waits for that
FAMILY = {
    "en": "what should the old teacher of my village do when a swollen knee hurts after every long walk".split(),
    "zh": list("老张今年六十五岁爬山之后膝盖肿胀疼痛应该怎么处理才能尽快恢复"),
}
EVALUATION = {
    "en": "A man of forty has pain in his left knee after a long walk in the rain and asks whether it is dangerous?",
    "zh": "患者男，四十岁，左膝关节疼痛三天，活动后加重，休息后可以缓解，没有外伤史，应该怎么办才好？",
}
REFUSALS = {"en": "I'm sorry, but I can't help with that.", "zh": "很抱歉，作为人工智能，我无法提供医疗建议。"}
FAULTS = ["429", "429 after", "500", "hang", "close", "html", "echo"]
# What an answer of 200 is, in parts of 100; the rest is as it should be.
ANSWERS = {"length": 4, "cut": 4, "repairable": 8, "prose": 3, "refusal": 4, "key": 2}
ITEMS = {"language": 5, "refusal": 4, "short": 3, "exact": 5, "near": 5, "evaluation": 5, "lacking": 3, "evidence": 5}


def choose(weights: dict[str, int], draw: random.Random) -> str:
    return draw.choices([*weights, "good"], [*weights.values(), 100 - sum(weights.values())])[0]


def text_of(language: str, draw: random.Random, length: int = 18) -> str:
    """A text of its own in a language, as far as filters can tell."""
    if language == "zh":
        return "".join(chr(draw.randrange(0x4E00, 0x9FA0)) for _ in range(2 * length)) + "。"
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(4, 8))) for _ in range(length)]
    words[::3] = [draw.choice(["the", "of", "and", "with"]) for _ in words[::3]]
    return " ".join(words) + "."


class Endpoint(ThreadingHTTPServer):
    """The server, which runs in a thread from `with` on."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, seed: int = 0, fault_rate: float = 0.25, seconds: float = 0.01, key: str = KEY):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seed, self.fault_rate, self.seconds, self.key = seed, fault_rate, seconds, key
        self.script: dict[int, str] = {}  # the fault of the n-th request, for tests of one fault
        self.lock, self.is_closing = threading.Lock(), threading.Event()
        self.attempts: Counter[str] = Counter()  # by id
        self.paid: Counter[str] = Counter()  # answers of 200 that were written, by id
        self.faults: Counter[str] = Counter()
        self.billed = Tokens()
        self.good: set[str] = set()  # questions that must be kept, less those that wait for their check
        self.unchecked: dict[str, list[str]] = {}
        self.in_flight = self.most_in_flight = 0
        self.headers_seen: dict[str, dict] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "OPENAI_BASE_URL": self.url,
            "OPENAI_API_KEY": self.key,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> Endpoint:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """The client was killed, which is what it is for."""

    def fault(self, name: str, attempt: int, number: int) -> str | None:
        if self.script:
            return self.script.get(number)
        draw = random.Random(f"{self.seed}/{name}/{attempt}")
        return draw.choice(FAULTS) if draw.random() < self.fault_rate and attempt < 5 else None

    def answer(self, name: str, messages: list[dict]) -> tuple[str, str]:
        """The content of an answer, and its finish_reason. The same for the same id."""
        draw = random.Random(f"{self.seed}/{name}")
        _, kind, language, *check = name.split("-")
        if check:
            return self._check(name.removesuffix("-check"), messages[-1]["content"], draw), "stop"
        shape = choose(ANSWERS, draw)
        if shape == "refusal":
            return REFUSALS[language], "stop"
        items = [self._item(kind, language, messages[-1]["content"], draw) for _ in range(2)]
        content = json.dumps({"items": [item for item, _ in items], "complete": True}, ensure_ascii=False)
        if shape in ("length", "cut"):
            return content[: draw.randrange(20, len(content) - 20)], "length" if shape == "length" else "stop"
        if shape == "key":
            return content.replace("complete", f"{self.key} complete", 1), "stop"
        if shape == "prose":
            return "Here is what you asked for.", "stop"
        if shape == "repairable":
            content = f"```json\n{content[:-1]},}}\n```"
        questions = [question for _, question in items]
        with self.lock:
            if kind == "passage":
                self.unchecked[name] = questions
            else:
                self.good.update(filter(None, questions))
        return content, "stop"

    def _item(self, kind: str, language: str, prompt: str, draw: random.Random) -> tuple[dict, str | None]:
        """One item, and its question where it must be kept; "" for one that its check judges, but no filter keeps."""
        what, other = choose(ITEMS, draw), "zh" if language == "en" else "en"
        if kind == "dialogue" and what in ("exact", "near"):
            what = "good"
        question, answer = text_of(language, draw), text_of(language, draw, 25)
        if what == "language":
            answer = text_of(other, draw, 25)
        elif what == "refusal":
            answer = REFUSALS[language]
        elif what == "short":
            answer = "Yes." if language == "en" else "是。"
        elif what in ("exact", "near"):
            tokens = list(FAMILY[language])
            if what == "near":
                tokens[draw.randrange(len(tokens))] = "new" if language == "en" else "新"
            question = (" " if language == "en" else "").join(tokens)
            answer = text_of(language, random.Random(0), 25) if what == "exact" else answer
        elif what == "evaluation":
            planted = EVALUATION[language].upper().replace(" ", "  ").replace("，", " ")
            question, answer = (planted, answer) if draw.random() < 0.5 else (question, answer + " " + planted)
        keep = question if what == "good" or (what == "evidence" and kind != "passage") else ""
        if kind == "dialogue":
            turns = [{"patient": question, "doctor": answer}]
            turns += [{"patient": text_of(language, draw, 9), "doctor": text_of(language, draw)}]
            item: dict = {"turns": turns}
        else:
            item = {"question": question, "answer": answer}
        if kind == "passage":
            passage = re.search(r"<passage>\n(.*)\n</passage>", prompt, re.DOTALL)[1]
            item["evidence"] = draw.choice(passage.split("\n"))
            if what == "evidence":
                item["evidence"], keep = text_of(language, draw), None
        if what == "lacking":
            item, keep = {"question": question}, None
        return item, keep

    def _check(self, parent: str, prompt: str, draw: random.Random) -> str:
        with self.lock:
            questions = [question for question in self.unchecked.get(parent, []) if question is not None]
        flags = [draw.random() < 0.7 for _ in questions]
        if draw.random() < 0.1:
            return json.dumps({"supported": [*flags, True], "complete": True})
        with self.lock:
            self.good.update(q for q, flag in zip(questions, flags, strict=True) if flag and q)
        return json.dumps({"supported": flags, "complete": True})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, name = self.server, self.headers["X-Client-Request-Id"]
        with server.lock:
            server.attempts[name] += 1
            server.headers_seen[name] = dict(self.headers)
            attempt, number = server.attempts[name], server.attempts.total()
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            self._answer(name, body, server.fault(name, attempt, number))
        finally:
            with server.lock:
                server.in_flight -= 1

    def _answer(self, name: str, body: dict, fault: str | None) -> None:
        server = self.server
        if self.headers["Authorization"] != f"Bearer {server.key}":
            fault = "401"
        if fault is not None:
            with server.lock:
                server.faults[fault] += 1
        if fault in ("hang", "close", "html", "cost"):
            self._bill(body, "x" * 400)
        if fault == "hang":
            server.is_closing.wait(SLOW_S)
        if fault in ("hang", "close"):
            self.close_connection = True
        elif fault == "html":
            self._write(200, b"<html>502</html>", {"Content-Type": "text/html"})
        elif fault is not None:
            self._refuse(fault)
        else:
            time.sleep(server.seconds)
            text, finish = server.answer(name, body["messages"])
            usage = self._bill(body, text)
            choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
            found = {"id": "x", "object": "chat.completion", "created": 1, "model": "odd-1", "choices": [choice]}
            with server.lock:
                server.paid[name] += 1
            self._write(200, json.dumps({**found, "usage": usage}).encode(), {"Content-Type": "application/json"})

    def _bill(self, body: dict, text: str) -> dict:
        prompt = sum(len(message["content"].encode()) // 3 for message in body["messages"])
        completion = min(body.get("max_tokens") or body.get("max_completion_tokens"), len(text.encode()) // 3)
        with self.server.lock:
            self.server.billed += Tokens(prompt, completion)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _refuse(self, fault: str) -> None:
        status, _, rest = fault.partition(" ")
        status = 500 if fault == "echo" else int(status)
        words = f"no luck with {self.headers['Authorization']} and half of it, {self.server.key[5:30]}"
        error = {"message": rest if status == 400 else words, "type": self.server.key, "code": None}
        headers = {"Content-Type": "application/json"}
        if rest.startswith("after"):
            headers["Retry-After"] = rest.removeprefix("after").strip() or "0.05"
        self._write(status, json.dumps({"error": error}).encode(), headers)

    def _write(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
