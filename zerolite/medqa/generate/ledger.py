"""What requests cost, in tokens and money, and the ceilings, which hold before a request is sent."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

PER_MESSAGE = 64  # tokens that a chat template may add to a message


class CeilingReached(Exception):
    """The next request could cost more than is left."""


@dataclass(frozen=True)
class Tokens:
    """Of prompts and of completions."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def __sub__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt - other.prompt, self.completion - other.completion)

    @property
    def total(self) -> int:
        return self.prompt + self.completion


def bound(messages: Sequence[dict], max_new_tokens: int) -> Tokens:
    """The most that a request can cost: no tokenizer makes more tokens of a text than it has bytes."""
    content = sum(len(message["content"].encode()) + PER_MESSAGE for message in messages)
    return Tokens(content, max_new_tokens)


class Ledger:
    """Tokens spent and reserved. What is reserved before each request is given back, or spent, once it has ended.

    price_in, price_out: money for a million tokens of prompts and of completions. max_cost, max_tokens: ceilings of all
    runs of a folder, None: none.
    """

    def __init__(self, price_in: float, price_out: float, max_cost: float | None, max_tokens: int | None):
        self.price_in, self.price_out = price_in, price_out
        self.max_cost, self.max_tokens = max_cost, max_tokens
        self.spent, self.reserved = Tokens(), Tokens()
        self._changed = asyncio.Condition()

    def cost(self, tokens: Tokens) -> float:
        return (tokens.prompt * self.price_in + tokens.completion * self.price_out) / 1e6

    def fits(self, tokens: Tokens) -> bool:
        """Whether a request may be sent that can cost so much: the ceilings hold if all in flight cost the most."""
        most = self.spent + self.reserved + tokens
        return (self.max_tokens is None or most.total <= self.max_tokens) and (
            self.max_cost is None or self.cost(most) <= self.max_cost
        )

    async def reserve(self, tokens: Tokens) -> None:
        """Wait until so much is left. Raises CeilingReached where it is not, with nothing in flight."""
        async with self._changed:
            while not self.fits(tokens):
                if not self.reserved.total:
                    raise CeilingReached(self.told(f"a request of at most {tokens.total} tokens has no room"))
                await self._changed.wait()
            self.reserved += tokens

    async def settle(self, reserved: Tokens, used: Tokens) -> None:
        """A request has ended, which `reserved` was for, and has cost `used`."""
        async with self._changed:
            self.reserved -= reserved
            self.spent += used
            self._changed.notify_all()

    def told(self, reason: str) -> str:
        limits = [f"{self.max_tokens} tokens"] if self.max_tokens is not None else []
        limits += [f"a cost of {self.max_cost:g}"] if self.max_cost is not None else []
        return f"the ceiling of {' and '.join(limits)} is reached: {reason}; {self}"

    def __str__(self) -> str:
        cost = f", cost {self.cost(self.spent):.4f}" if self.price_in or self.price_out else ""
        return f"{self.spent.prompt} prompt and {self.spent.completion} completion tokens spent{cost}"
