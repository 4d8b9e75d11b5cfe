"""One request to an OpenAI-compatible endpoint: attempts, waits between them, what each may cost.

tenacity repeats, not the client: the client would neither wait longer than eight seconds by itself nor let the ledger
see its attempts.
"""

import asyncio
import email.utils
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

from zerolite.medqa.generate.journal import Answer, Journal
from zerolite.medqa.generate.keys import Key
from zerolite.medqa.generate.ledger import Ledger, Tokens, bound
from zerolite.medqa.generate.plan import Request

LONGEST_WAIT_S = 60.0  # of our own choice
LONGEST_RETRY_AFTER_S = 600.0  # that the endpoint may ask for


class Stop(Exception):
    """No further request has a chance: the key is refused, there is no such model, the endpoint asks for hours."""


class Lost(Exception):
    """A request has no answer after all of its attempts; the run goes on."""


class Failed(Exception):
    """One attempt has failed."""

    def __init__(self, reason: str, is_final: bool, retry_after: float | None = None, is_unknown: bool = False):
        """is_final: another attempt would fail as well. is_unknown: whether it was answered, and paid, is not known."""
        super().__init__(reason)
        self.is_final, self.retry_after, self.is_unknown = is_final, retry_after, is_unknown


@dataclass(frozen=True)
class Settings:
    """Of requests: model, longest completion, temperature (None: the endpoint's), attempts, seconds."""

    model: str
    max_new_tokens: int = 2048
    temperature: float | None = None
    is_json: bool = True  # whether to ask for a JSON object by response_format
    max_attempts: int = 8
    first_wait: float = 1.0
    timeout: float = 120.0


class Endpoint:
    """The client, and the journal and ledger that know of every attempt."""

    def __init__(self, settings: Settings, key: Key, journal: Journal, ledger: Ledger):
        import openai

        self.settings, self.key, self.journal, self.ledger = settings, key, journal, ledger
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            api_key=key.value,
            base_url=os.environ.get("OPENAI_BASE_URL") or None,
            max_retries=0,
            timeout=settings.timeout,
        )
        self._limit = "max_tokens"  # what the endpoint calls it

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, request: Request) -> Answer:
        """The answer, which is in the journal. Raises Lost, Stop, CeilingReached."""
        import tenacity

        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Failed) and not error.is_final),
            stop=tenacity.stop_after_attempt(self.settings.max_attempts),
            wait=_wait(self.settings.first_wait),
            reraise=True,
        )
        try:
            return await attempts(self._attempt, request)
        except Failed as error:
            raise Lost(str(error)) from None

    async def _attempt(self, request: Request) -> Answer:
        most, used = bound(request.messages, self.settings.max_new_tokens), Tokens()
        await self.ledger.reserve(most)
        try:
            self.journal.sent(request.id, most)
            try:
                answer = await asyncio.wait_for(self._send(request), self.settings.timeout)
                self.journal.add(answer)
                used = answer.tokens
                return answer
            except (Exception, asyncio.CancelledError) as error:
                failed = error if isinstance(error, (Failed, Stop)) else self._failed(error)
                used = most if getattr(failed, "is_unknown", False) else Tokens()
                self.journal.lose(request.id, str(failed), used)
                if isinstance(error, asyncio.CancelledError):
                    raise
                # Neither the cause nor the context is kept: they hold the endpoint's words, which may hold the key.
                raise failed from None
        finally:
            await self.ledger.settle(most, used)

    async def _send(self, request: Request) -> Answer:
        settings = self.settings
        options: dict = {self._limit: settings.max_new_tokens}
        if settings.temperature is not None:
            options["temperature"] = settings.temperature
        if settings.is_json:
            options["response_format"] = {"type": "json_object"}
        found = await self._client.chat.completions.create(
            model=settings.model,
            messages=list(request.messages),
            extra_headers={"X-Client-Request-Id": request.id},
            **options,
        )
        if not getattr(found, "choices", None) or getattr(found.choices[0], "message", None) is None:
            raise Failed("the endpoint's answer is no chat completion", is_final=False, is_unknown=True)
        choice, usage, most = found.choices[0], found.usage, bound(request.messages, settings.max_new_tokens)
        text, finish = choice.message.content or "", str(choice.finish_reason)
        if getattr(choice.message, "refusal", None):
            finish = "refusal"
        if self.key.is_in(text):
            text, finish = "", "key"
        if usage is None or not isinstance(usage.prompt_tokens, int) or not isinstance(usage.completion_tokens, int):
            tokens = most  # it does not say
        else:
            tokens = Tokens(usage.prompt_tokens, usage.completion_tokens)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Answer(request.id, text, finish, tokens, self.key.masked(str(found.model or settings.model)), now)

    def _failed(self, error: BaseException) -> Failed | Stop:
        """What an error of the client means, in words without the key."""
        openai = self._openai
        if isinstance(error, openai.APIStatusError):
            return self._refused(error)
        if isinstance(error, (asyncio.TimeoutError, openai.APITimeoutError)):
            return Failed(f"no answer within {self.settings.timeout:g} s", is_final=False, is_unknown=True)
        if isinstance(error, openai.APIConnectionError):
            cause = type(error.__cause__).__name__
            return Failed(f"the connection failed ({cause})", is_final=False, is_unknown="Connect" not in cause)
        if isinstance(error, asyncio.CancelledError):
            return Failed("cancelled", is_final=True, is_unknown=True)
        if isinstance(error, OSError):
            return Stop(f"{error.filename or self.journal.path}: {error.strerror}")
        words = self._words(f"{type(error).__name__}: {error}")
        return Failed(f"the endpoint's answer cannot be read ({words})", is_final=False, is_unknown=True)

    def _refused(self, error) -> Failed | Stop:
        status, words = error.status_code, self._words(str(error))
        if status in (401, 403, 404):
            hint = {401: "OPENAI_API_KEY", 403: "OPENAI_API_KEY", 404: "--model and OPENAI_BASE_URL"}[status]
            return Stop(f"the endpoint refuses ({words}): see to {hint}")
        if status == 429 and error.code == "insufficient_quota":
            return Stop(f"the endpoint refuses ({words})")
        after = seconds_of(error.response.headers)
        if after is not None and after > LONGEST_RETRY_AFTER_S:
            return Stop(f"the endpoint asks to wait {after:.0f} s: start again then, and the run goes on")
        if status == 400 and self._limit == "max_tokens" and "max_completion_tokens" in str(error):
            self._limit = "max_completion_tokens"  # OpenAI's newer models know this one alone
            return Failed("max_tokens is not known to the endpoint", is_final=False, retry_after=0.0)
        return Failed(words, is_final=status < 500 and status not in (408, 409, 425, 429), retry_after=after)

    def _words(self, text: str) -> str:
        """The beginning of an error's text, in one line."""
        return " ".join(self.key.masked(text).split())[:300]


def _wait(first: float) -> Callable:
    """Seconds until the next attempt: what the endpoint asks for and a little more, else doubled each time, +-50 %."""

    def wait(state) -> float:
        after = state.outcome.exception().retry_after
        if after is not None:
            return after + random.uniform(0, min(1.0, 0.1 * after))
        return min(LONGEST_WAIT_S, first * 2 ** (state.attempt_number - 1)) * random.uniform(0.5, 1.5)

    return wait


def seconds_of(headers) -> float | None:
    """The seconds of `Retry-After`, which has a number or a date, or of `retry-after-ms`; None without a usable one."""
    for name, divisor in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / divisor
        except ValueError:
            date = email.utils.parsedate_tz(value)
            if date is None:
                continue
            seconds = email.utils.mktime_tz(date) - time.time()
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
