"""Three tasks with a verifier, and writers of imperfect answers. Pure Python.

`change`: pay an amount with the coins in a purse.

    pay 3 7 with c1 c5 c20 :        c20 c5 c5 c5 c1 c1

Every exact payment is right, and fewer coins are better: the reward is the smallest possible number
of coins divided by the number used, and 0 for a wrong sum or a coin that is not in the purse. Right
answers have different rewards and lengths, so imitating right answers, or the best logged ones, is
not optimal.

`carry`: add two numbers, units first.

    7 4 2 + 6 5 8 =                 3 0 1 1

The reward is 1 for the right sum and 0 otherwise. The writers drop carries: nine in ten of their
answers are wrong.

`rated`: `change` with another log. Its rewards are the graded scores of a simulated reward model:
the reward of `change` plus an error that is a fixed function of prompt and response. New answers
are judged by the reward of `change`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from statistics import NormalDist
from typing import Protocol

Words = tuple[str, ...]
Carries = Callable[[int], bool]
COINS = (1, 2, 3, 5, 8, 10, 15, 20)
SMALLEST, LARGEST = 5, 40
DIGITS = 3


class Task(Protocol):
    """The interface of a task.

    Attributes:
        name: the name of the task.
        models: the name of the task whose models and prompts it uses.
        vocabulary: the words of prompts and responses.
        max_new_tokens: limit of a sampled answer.
    """

    name: str
    models: str
    vocabulary: Words
    max_new_tokens: int

    def prompt(self, rng: random.Random) -> Words:
        """A random prompt."""

    def written(self, prompt: Words, rng: random.Random) -> Words:
        """An answer for pretraining: in the right format, but not optimal."""

    def person(self, prompt: Words, rng: random.Random) -> Words:
        """An answer of a scripted person with systematic errors."""

    def reward(self, prompt: Words, response: Words) -> float:
        """The reward in [0, 1]; 1 for the best possible answer."""

    def logged(self, prompt: Words, response: Words) -> float:
        """The reward that a log holds."""


class Change:
    """Pay an amount with as few coins as possible."""

    name = models = "change"
    vocabulary = ("pay", "with", ":", *map(str, range(10)), *(f"c{coin}" for coin in COINS))
    max_new_tokens = 32

    def prompt(self, rng: random.Random) -> Words:
        """An amount, and a purse with coins of value 1 and two or three other values."""
        kinds = sorted({1, *rng.sample(COINS[1:], rng.choice((2, 3)))})
        amount = rng.randint(SMALLEST, LARGEST)
        return ("pay", str(amount // 10), str(amount % 10), "with", *(f"c{c}" for c in kinds), ":")

    def written(self, prompt: Words, rng: random.Random) -> Words:
        """Random coins that do not exceed the rest, until the amount is paid."""
        amount, kinds = _purse(prompt)
        used = []
        while amount:
            used.append(rng.choice([coin for coin in kinds if coin <= amount]))
            amount -= used[-1]
        return tuple(f"c{coin}" for coin in used)

    def person(self, prompt: Words, rng: random.Random) -> Words:
        """Two to four coins of value 1, then the rest greedily with the largest coins."""
        amount, kinds = _purse(prompt)
        used = [1] * rng.randint(2, 4)
        amount -= len(used)
        for coin in sorted(kinds, reverse=True):
            used += [coin] * (amount // coin)
            amount %= coin
        return tuple(f"c{coin}" for coin in used)

    def reward(self, prompt: Words, response: Words) -> float:
        """Smallest possible number of coins / number of coins used; 0 for a wrong payment."""
        amount, kinds = _purse(prompt)
        coins = [int(word[1:]) for word in response if word[0] == "c"]
        right = len(coins) == len(response) and sum(coins) == amount
        if not right or not set(coins) <= set(kinds):
            return 0.0
        return fewest(amount, tuple(kinds)) / len(coins)

    def logged(self, prompt: Words, response: Words) -> float:
        """The reward."""
        return self.reward(prompt, response)


def _purse(prompt: Words) -> tuple[int, list[int]]:
    return int(prompt[1] + prompt[2]), [int(word[1:]) for word in prompt[4:-1]]


def fewest(amount: int, kinds: tuple[int, ...]) -> int:
    """The smallest number of coins with the given sum."""
    best = [0]
    for part in range(1, amount + 1):
        best.append(1 + min(best[part - coin] for coin in kinds if coin <= part))
    return best[amount]


class Carry:
    """Add two numbers of three digits."""

    name = models = "carry"
    vocabulary = ("+", "=", *map(str, range(10)))
    max_new_tokens = 6
    dropped = 0.7

    def prompt(self, rng: random.Random) -> Words:
        """Two numbers, units first, with at least two carries between them."""
        while True:
            one, two = ([rng.randrange(10) for _ in range(DIGITS)] for _ in range(2))
            if sum(a + b > 9 for a, b in zip(one, two, strict=True)) >= 2:
                return (*map(str, one), "+", *map(str, two), "=")

    def written(self, prompt: Words, rng: random.Random) -> Words:
        """A sum in which each carry is dropped with probability `dropped`."""
        return self._added(prompt, lambda place: rng.random() >= self.dropped)

    def person(self, prompt: Words, rng: random.Random) -> Words:
        """A sum without the carry into the hundreds; others are dropped with probability 0.1."""
        return self._added(prompt, lambda place: place != 1 and rng.random() < 0.9)

    def reward(self, prompt: Words, response: Words) -> float:
        """1 for the right sum, else 0."""
        return float(response == self._added(prompt, lambda place: True))

    def logged(self, prompt: Words, response: Words) -> float:
        """The reward."""
        return self.reward(prompt, response)

    def _added(self, prompt: Words, carries: Carries) -> Words:
        one, two = prompt[:DIGITS], prompt[DIGITS + 1 : -1]
        carry, digits = 0, []
        for place, (a, b) in enumerate(zip(one, two, strict=True)):
            total = int(a) + int(b) + carry
            digits.append(total % 10)
            carry = int(total > 9 and carries(place))
        return tuple(map(str, [*digits, carry] if carry else digits))


class Rated(Change):
    """`Change` with a log whose rewards are scores of a simulated reward model.

    The error of a score is Gaussian with the standard deviation `error`. It depends on prompt and
    response alone, as that of a trained reward model does: the same response always has the same
    score, and scoring again does not help.
    """

    name = "rated"
    error = 0.2

    def logged(self, prompt: Words, response: Words) -> float:
        """The score: the reward plus the error. It may lie outside of [0, 1]."""
        text = " ".join((*prompt, *response)).encode()
        number = int.from_bytes(hashlib.sha256(text).digest()[:6], "big")
        uniform = (number + 0.5) / 2**48
        return self.reward(prompt, response) + self.error * NormalDist().inv_cdf(uniform)


TASKS: dict[str, Task] = {task.name: task for task in (Change(), Carry(), Rated())}
