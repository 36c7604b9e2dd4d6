"""The task: pay an amount exactly with strange coins; the fewer coins, the better.

    prompt      pay 47 with 1 4 9 20 :
    response    -20 27 -20 7 -4 3 -1 2 -1 1 -1 0       six coins
                -20 27 -9 18 -9 9 -9 0                 four coins, the fewest that can do it

A response takes one coin at a time and writes what is left. Every coin must come from the till,
every subtraction must be right, and nothing may be left at the end. Many responses are right, and
they differ in worth: the reward is (fewest possible coins) / (coins used), so 1 at best, and 0 for
a payment that is wrong. Taking the largest coin that fits is a fair habit and often not the best.

This file is pure Python: prompts, shoppers, a scripted person, and the program that checks.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass
from functools import cache

STRANGE_COINS = (3, 4, 6, 7, 9, 10, 13, 15, 18, 20)
AMOUNTS = range(8, 41)
MAX_COINS = 14
"""Shoppers give up and start again beyond this many coins; nothing forbids a model to go on."""


@dataclass(frozen=True)
class Problem:
    """An amount to pay (in coins' units) and the kinds of coin at hand, ascending, 1 among them."""

    amount: int
    till: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"pay {self.amount} with {' '.join(map(str, self.till))} :"

    @property
    def name(self) -> str:
        """Stable id, used as the prompt's id in the logs."""
        return f"{self.amount}-from-{'-'.join(map(str, self.till))}"


def vocabulary() -> list[str]:
    """Every word that a prompt or a response may hold, in a fixed order."""
    numbers = [str(n) for n in range(max(AMOUNTS) + 1)]
    coins = [f"-{coin}" for coin in (1, *STRANGE_COINS)]
    return ["pay", "with", ":", *numbers, *coins]


def split_problems() -> tuple[list[Problem], list[Problem]]:
    """All problems as (train, held-out); one in ten is held out, chosen by a hash of its name.

    Held-out problems are in no pretraining text, no log and no shard.
    """
    train, held_out = [], []
    for coins in itertools.combinations(STRANGE_COINS, 3):
        for amount in AMOUNTS:
            problem = Problem(amount, (1, *coins))
            if fewest_coins(problem.amount, problem.till) > MAX_COINS // 2:
                continue
            digest = hashlib.sha256(problem.name.encode()).digest()
            (held_out if digest[0] % 10 == 0 else train).append(problem)
    return train, held_out


# ---------------------------------------------------------------- the program that checks


@cache
def fewest_coins(amount: int, till: tuple[int, ...]) -> int:
    """The fewest coins from ``till`` that add up to ``amount``, by dynamic programming."""
    if amount == 0:
        return 0
    return 1 + min(fewest_coins(amount - coin, till) for coin in till if coin <= amount)


def coins_used(problem: Problem, response: str) -> int | None:
    """How many coins a right response takes; None for a response that is wrong."""
    words = response.split()
    if len(words) % 2 or not words:
        return None
    left = problem.amount
    for coin_word, left_word in zip(words[::2], words[1::2], strict=True):
        if coin_word not in {f"-{coin}" for coin in problem.till}:
            return None
        left += int(coin_word)
        if left < 0 or left_word != str(left):
            return None
    return len(words) // 2 if left == 0 else None


def reward(problem: Problem, response: str) -> float:
    """(fewest possible coins) / (coins used) for a right response, 0 for a wrong one."""
    used = coins_used(problem, response)
    return 0.0 if used is None else fewest_coins(problem.amount, problem.till) / used


# ---------------------------------------------------------------- those who pay


def written(amount: int, coins: list[int]) -> str:
    """The response that takes ``coins`` in this order: ``-20 27 -9 18 ...``."""
    left = [amount - paid for paid in itertools.accumulate(coins)]
    return " ".join(f"-{coin} {rest}" for coin, rest in zip(coins, left, strict=True))


def shopper(problem: Problem, rng: random.Random) -> str:
    """A right but thoughtless payment: what the policy is pretrained on.

    Each shopper draws coins at random among those that fit, and each has its own liking for small
    change: coin c is drawn with weight c^(-liking), liking uniform between 0 and 0.6.
    """
    liking = rng.uniform(0.0, 0.6)
    while True:
        coins: list[int] = []
        left = problem.amount
        while left and len(coins) < MAX_COINS:
            fitting = [coin for coin in problem.till if coin <= left]
            coin = rng.choices(fitting, [c**-liking for c in fitting])[0]
            coins.append(coin)
            left -= coin
        if not left:
            return written(problem.amount, coins)


def scripted_person(problem: Problem, rng: random.Random) -> str:
    """A person with habits of their own: hoards the largest coin and always starts small.

    They get rid of one or two ones first, then pay with the second largest coin while it fits, the
    smaller ones after it. One time in twelve they miscount by one and never notice.
    """
    coins = [1] * min(rng.choice((1, 2)), problem.amount)
    left = problem.amount - len(coins)
    for coin in sorted(problem.till[:-1], reverse=True):
        coins += [coin] * (left // coin)
        left %= coin
    words = written(problem.amount, coins).split()
    if rng.random() < 1 / 12:
        slip = 2 * rng.randrange(len(coins)) + 1
        words[slip] = str(abs(int(words[slip]) - 1))
    return " ".join(words)
