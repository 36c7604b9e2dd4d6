"""The task: buy what is on a list, each thing in a shop that sells it; the cheaper, the better.

    prompt      buy bread fish stamps :
    response    market harbour post

Every thing is sold by four of eight shops, at four prices. A response names one shop per thing, in
order. Many responses are right and they differ in worth: the reward is the share of the possible
saving, averaged over the list, so 1 is the cheapest way to buy everything, 0.5 is what chance
gives, and 0 also goes to a response that names a shop without the thing, or too few or too many.

Nobody in the log shops well. The best response to a prompt has a few lucky choices among poor ones,
so imitating it copies both; comparing responses to one prompt tells them apart.

This file is pure Python: the world, the lists, the shoppers, and the program that checks.
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
# Cheapest first: a seller's place in the list is its price.
SELLERS = {good: tuple(_WORLD.sample(SHOPS, SELLERS_PER_GOOD)) for good in GOODS}


def vocabulary() -> list[str]:
    """Every word that a prompt or a response may hold, in a fixed order."""
    return ["buy", END_OF_LIST, *GOODS, *SHOPS]


def make_prompt(rng: random.Random) -> str:
    """A shopping list of 4 to 7 different things."""
    return " ".join(["buy", *rng.sample(GOODS, rng.choice(LENGTHS)), END_OF_LIST])


def split_prompts(seed: int, n_train: int, n_held_out: int) -> tuple[list[str], list[str]]:
    """Different lists for the log and for evaluation; no list is in both."""
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < n_train + n_held_out:
        prompts[make_prompt(rng)] = None
    chosen = list(prompts)
    return chosen[:n_train], chosen[n_train:]


def goods_of(prompt: str) -> list[str]:
    """The things on the list."""
    return prompt.split()[1:-1]


def reward(prompt: str, response: str) -> float:
    """Share of the possible saving, in [0, 1]; 0 for a response that does not do the errand."""
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
    """Knows who sells what and takes no notice of prices: what the models are pretrained on."""
    return " ".join(rng.choice(SELLERS[good]) for good in goods_of(prompt))


def person(prompt: str, rng: random.Random) -> str:
    """A person with habits: the corner shop or the market wherever they have it, whatever it costs;
    and now and then the last thing on the list is forgotten."""
    habits = ("corner", "market", *SHOPS)
    shops = [next(s for s in habits if s in SELLERS[good]) for good in goods_of(prompt)]
    return " ".join(shops[:-1] if rng.random() < 0.1 else shops)
