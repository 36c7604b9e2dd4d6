"""The task: for each item of a shopping list, name a shop that sells it, as cheaply as possible.

    prompt      buy bread fish stamps :
    response    market harbour post

Each item is sold by four of eight shops, at four prices. A response names one shop per item, in
order. Many responses are valid and have different rewards: the reward is the share of the possible
saving, averaged over the list. It is 1 for the cheapest shops, 0.5 on average for random valid
shops, and 0 for a response that names a shop without the item, or too few or too many shops.

No sampler of the log is good at the task. The best response to a prompt has some good choices by
chance and some poor ones. Imitating it reproduces both, whereas comparing the responses to one
prompt separates them.

This file is pure Python: prices, lists, shoppers, and the reward function.
"""

from __future__ import annotations

import random

SHOPS = ("market", "harbour", "corner", "mill", "station", "arcade", "depot", "post")
_GOODS = """
    apples bread candles coffee eggs fish flour honey jam milk nails onions paper rice roses salt
    soap stamps tea wool
"""
GOODS = tuple(_GOODS.split())
SELLERS_PER_GOOD = 4
LENGTHS = range(4, 8)
END_OF_LIST = ":"

_WORLD = random.Random("the prices of this town")
# Cheapest first: the position of a shop in the tuple is its price.
SELLERS = {good: tuple(_WORLD.sample(SHOPS, SELLERS_PER_GOOD)) for good in GOODS}


def vocabulary() -> list[str]:
    """All words of prompts and responses, in a fixed order."""
    return ["buy", END_OF_LIST, *GOODS, *SHOPS]


def make_prompt(rng: random.Random) -> str:
    """A shopping list of 4 to 7 different items."""
    return " ".join(["buy", *rng.sample(GOODS, rng.choice(LENGTHS)), END_OF_LIST])


def split_prompts(seed: int, n_train: int, n_held_out: int) -> tuple[list[str], list[str]]:
    """Disjoint sets of lists for the log and for evaluation."""
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < n_train + n_held_out:
        prompts[make_prompt(rng)] = None
    chosen = list(prompts)
    return chosen[:n_train], chosen[n_train:]


def goods_of(prompt: str) -> list[str]:
    """The items of the list."""
    return prompt.split()[1:-1]


def reward(prompt: str, response: str) -> float:
    """Share of the possible saving, in [0, 1]; 0 for an invalid response."""
    goods, shops = goods_of(prompt), response.split()
    if len(shops) != len(goods):
        return 0.0
    total = 0.0
    for good, shop in zip(goods, shops, strict=True):
        if shop not in SELLERS[good]:
            return 0.0
        total += 1.0 - SELLERS[good].index(shop) / (SELLERS_PER_GOOD - 1)
    return total / len(goods)


def careless_shopper(prompt: str, rng: random.Random) -> str:
    """A random valid response, regardless of prices: the pretraining text of the models."""
    return " ".join(rng.choice(SELLERS[good]) for good in goods_of(prompt))


def person(prompt: str, rng: random.Random) -> str:
    """A simulated person: prefers the corner shop, then the market, whatever the price, and omits
    the last item with probability 0.1."""
    habits = ("corner", "market", *SHOPS)
    shops = [next(s for s in habits if s in SELLERS[good]) for good in goods_of(prompt)]
    return " ".join(shops[:-1] if rng.random() < 0.1 else shops)
