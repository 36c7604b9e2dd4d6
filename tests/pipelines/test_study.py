"""`research/study`: its tasks, what its tables say, and the whole of it at its smallest."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fork_server import ForkServer

STUDY = Path(__file__).parents[2] / "research" / "study"
OWN = ("draw", "jobs", "learn", "models", "report", "search", "tasks", "world")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The study's modules by name; other pipelines have files of the same names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDY)
        for name in OWN:
            patch.delitem(sys.modules, name, raising=False)
        found = {name: __import__(name) for name in OWN}
        yield found
        for name in OWN:
            sys.modules.pop(name, None)


def test_fewest_coins_are_those_of_a_search(modules: dict[str, ModuleType]) -> None:
    """Greedy pays 10 from 1, 5, 8 as 8 + 1 + 1; two fives are fewer. All sums of three coins."""
    fewest = modules["tasks"].fewest
    assert fewest(10, (1, 5, 8)) == 2
    kinds = (1, 3, 8, 20)
    for coins in itertools.product(kinds, repeat=3):
        assert fewest(sum(coins), kinds) <= 3
    assert [fewest(n, kinds) for n in (1, 2, 4, 7)] == [1, 2, 2, 3]  # 7 = 3 + 3 + 1


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6))
def test_what_writers_write_is_worth_what_it_is(modules: dict[str, ModuleType], seed: int) -> None:
    """Any exact payment is worth something, the fewest coins 1; a sum is right or worth nothing."""
    tasks, rng = modules["tasks"].TASKS, random.Random(seed)
    change, carry = tasks["change"], tasks["carry"]
    prompt = change.prompt(rng)
    written = change.written(prompt, rng)
    assert 0 < change.reward(prompt, written) <= 1
    assert change.reward(prompt, (*written, "c1")) == 0
    assert change.reward(prompt, change.person(prompt, rng)) > 0
    prompt = carry.prompt(rng)
    one, two = "".join(prompt[:3])[::-1], "".join(prompt[4:7])[::-1]
    right = tuple(str(int(one) + int(two)).zfill(3)[::-1])
    assert carry.reward(prompt, right) == 1
    assert carry.reward(prompt, carry.written(prompt, rng)) in (0, 1)


def row(seed: int, loss: str, objective: float, **more: float) -> dict[str, object]:
    figures = dict.fromkeys(("reward", "kl", "score", "explained_variance"), 0.0)
    job = {"task": "t", "loss": loss, "seed": seed}
    return {"job": job, "objective": objective, **figures, **more}


def test_a_standing_is_counted_seed_by_seed(modules: dict[str, ModuleType]) -> None:
    """rft leads by 0.1 and 0.3: 0.2 on average, with an error of 0.1, so beyond one error."""
    labelled = [
        ("losses", loss, row(seed, loss, value))
        for loss, values in {"gvpo": (0.5, 0.4), "rft": (0.6, 0.7), "dpo": (0.1, 0.9)}.items()
        for seed, value in enumerate(values)
    ]
    labelled.append(("losses", "gvpo, anchor 0.1", row(0, "gvpo", 9.0)))  # a variant, not a loss
    found = modules["report"]._standing("t", labelled)
    assert found["best"] == "rft"
    assert found["gvpo_behind"] == pytest.approx([0.2, 0.1])
    assert found["gvpo_within_one_se"] is False


def test_judges_are_counted_over_pairs_of_the_grid(modules: dict[str, ModuleType]) -> None:
    """Rewards 1, 2, 3 and scores 1, 3, 2: two of three pairs are ordered alike."""
    grid = [
        (
            "grid",
            "",
            row(0, "gvpo", 0.0, reward=a, score=b, reweighted_reward=a, best_log_ratio=-a),
        )
        for a, b in ((1.0, 1.0), (2.0, 3.0), (3.0, 2.0))
    ]
    found = modules["report"]._judges("t", grid)
    assert found["score"] == pytest.approx(2 / 3)
    assert (found["reweighted_reward"], found["best_log_ratio"]) == (1, 0)


def smallest() -> None:
    """A process of the test below: the folder of the models is in sys.argv."""
    sys.path.insert(0, str(STUDY))
    jobs, learn, study, world = (__import__(n) for n in ("jobs", "learn", "study", "world"))
    world.RECIPES["carry"] = world.Recipe(16, 16, 8)
    world.N_PROMPTS, world.N_VALIDATION, world.N_TEST, world.N_HELD_OUT = 24, 4, 4, 8
    learn.N_HELD_OUT, learn.GROUPS_PER_STEP = 8, 4
    folder = Path(sys.argv[1])
    study.make_models("carry", folder / "carry")
    runner = study.Runner(folder)
    plain = jobs.Job("carry", "gvpo", 1e-3, 1, steps=6)
    others = ({"rounds": 2}, {"start": "rft"}, {"loss": "none"}, {})
    print(json.dumps([runner(replace(plain, **other)) for other in ({}, *others)]))


def test_a_run_at_its_smallest_is_the_same_twice(tmp_path: Path, server: ForkServer) -> None:
    """Models made, a log drawn, a policy trained and judged; untouched, its log-ratios are 0."""
    status, output = server.run([tmp_path], program=f"{__name__}:{smallest.__name__}")
    assert status == 0, output
    first, rounds, warm, untouched, again = json.loads(output.splitlines()[-1])
    assert untouched["kl"] == pytest.approx(0, abs=1e-5)
    assert untouched["explained_variance"] == pytest.approx(0, abs=1e-4)
    assert len({one["log_mass"] for one in (first, rounds, warm, untouched)}) == 4
    del first["cpu_seconds"], again["cpu_seconds"]
    assert first == again
