"""`research/study`: its tasks, what its tables say, and the whole of it at its smallest."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, pstdev
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fork_server import ForkServer

from gvpo_offline.losses import LOSS_TYPES

STUDY = Path(__file__).parents[2] / "research" / "study"
OWN = (
    *("draw", "jobs", "learn", "models", "plan", "rates", "report", "search", "study", "tasks"),
    "world",
)


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


def test_a_score_of_the_reward_model_is_a_fixed_function_of_the_text(
    modules: dict[str, ModuleType],
) -> None:
    """Of 2000 errors the mean is 0 and the deviation 0.2, each within five standard errors: 0.2 /
    2000^0.5 = 0.0045, and 0.2 / 4000^0.5 = 0.0032. The reward has no error."""
    tasks = modules["tasks"]
    rated, change, rng = tasks.TASKS["rated"], tasks.TASKS["change"], random.Random(0)
    prompts = [rated.prompt(rng) for _ in range(2000)]
    pairs = [(prompt, rated.written(prompt, rng)) for prompt in prompts]
    errors = [rated.logged(*pair) - rated.reward(*pair) for pair in pairs]
    assert fmean(errors) == pytest.approx(0, abs=5 * 0.0045)
    assert pstdev(errors) == pytest.approx(0.2, abs=5 * 0.0032)
    assert errors == [rated.logged(*pair) - rated.reward(*pair) for pair in pairs]
    assert all(rated.reward(*pair) == change.logged(*pair) for pair in pairs)


def row(seed: int, loss: str, objective: float, **more: float) -> dict[str, object]:
    figures = dict.fromkeys(("reward", "kl", "score", "explained_variance", "alpha"), 0.0)
    job = {"task": "t", "loss": loss, "seed": seed}
    return {"job": job, "objective": objective, **figures, **more}


def test_a_standing_is_counted_seed_by_seed(modules: dict[str, ModuleType]) -> None:
    """rft is ahead of the recommendation by 0.4 and 0.2: 0.3 +- 0.1. dpo is ahead by 0.1 and 0.3 on
    the seeds that both have. rft is 0.4 ahead of gvpo and the recommendation 0.1: a quarter."""
    values = {
        "recommended": (0.5, 0.5),
        "gvpo": (0.5, 0.3),
        "rft": (0.9, 0.7),
        "dpo": (0.6, 0.8, -9.0),
    }
    labelled = [
        ("losses", loss, row(seed, loss, value))
        for loss, own in values.items()
        for seed, value in enumerate(own)
    ]
    labelled.append(("own answers", "awr", row(0, "awr", 9.0)))  # of another table
    found = modules["report"].standing("losses", "t", labelled)
    assert found["best_other"] == "rft"
    assert found["behind_it"] == pytest.approx([0.3, 0.1])
    assert found["ahead_of_gvpo"] == pytest.approx([0.1, 0.1])
    assert found["share_of_gap_closed"] == pytest.approx(0.25)


def test_runs_are_paired_with_gvpo_of_the_same_log(modules: dict[str, ModuleType]) -> None:
    """In a table of losses with gvpo itself, elsewhere with gvpo of the same setting."""
    base = modules["report"]._base
    assert base("losses", "gvpo, chi-squared link") == "gvpo"
    assert base("person", "recommended without the person, 2 of 8") == "gvpo, 2 of 8"
    one, other = ([row(n, "", v) for n, v in own] for own in (((1, 0.5), (2, 0.7)), ((2, 0.4),)))
    assert modules["report"].paired(one, other)[0] == pytest.approx(0.3)


class Curves:
    """Runs whose objective is a function of point and rate; counts them."""

    def __init__(self, peaks: dict[str, float], slope: float = 1.0) -> None:
        self.peaks, self.slope, self.rates = peaks, slope, list[tuple[str, float]]()

    def __call__(self, jobs: list[Any]) -> list[dict[str, Any]]:
        rows = []
        for job in jobs:
            assert (job.seed, job.validate) == (0, True)
            if (job.loss, job.rate) not in self.rates:
                self.rates.append((job.loss, job.rate))
            value = -self.slope * abs(math.log10(job.rate / self.peaks[job.loss]))
            rows.append({"job": asdict(job), "objective": value, "by_prompt": [value, value + 0.1]})
        return rows


def test_a_rate_is_searched_past_the_ends_and_from_the_neighbour(
    modules: dict[str, ModuleType],
) -> None:
    """gvpo begins at 3e-4 and its peak is 1e-2: 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, and 3e-2 that is
    worse. rft begins where gvpo ended, which is its peak too: three runs."""
    rates, job = modules["rates"], modules["jobs"].Job
    points = {
        "second": rates.Point(job("carry", "rft", 0.0, 5), "first"),
        "first": rates.Point(job("carry", "gvpo", 0.0, 5), 3e-4),
    }
    run = Curves({"gvpo": 1e-2, "rft": 1e-2})
    assert rates.choose_rates(points, run) == {"first": 1e-2, "second": 1e-2}
    assert sorted(r for loss, r in run.rates if loss == "gvpo") == [
        *(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    ]
    assert sorted(r for loss, r in run.rates if loss == "rft") == [3e-3, 1e-2, 3e-2]
    assert rates.with_rate(points["first"], 1e-2, 7).seed == 7
    with pytest.raises(ValueError, match="first"):
        rates.choose_rates({"first": rates.Point(points["first"].job, "none")}, run)


def test_near_ties_are_decided_by_a_second_seed(modules: dict[str, ModuleType]) -> None:
    """The differences between the best rate and a smaller one are 0.0 and 0.2: 0.1 +- 0.1, which
    is within one standard error, so both run at seed 1. There the larger rate loses 0.3, and the
    smaller one has the better mean. With 0.1 and 0.2 they are 0.15 +- 0.05: no second run.
    """
    rates, job = modules["rates"], modules["jobs"].Job

    def own(rate: float, *values: float) -> dict[str, Any]:
        made = asdict(job("carry", "gvpo", rate, 0, validate=True))
        return {"job": made, "objective": fmean(values), "by_prompt": values}

    asked: list[Any] = []

    def run(jobs: list[Any]) -> list[dict[str, Any]]:
        asked.extend(jobs)
        return [own(j.rate, *([0.2] * 2 if j.rate == 1e-3 else [0.4] * 2)) for j in jobs]

    best, far = own(1e-3, 0.5, 0.5), own(3e-3, 0.1, 0.1)
    level = rates.contenders([own(3e-4, 0.5, 0.3 + 1e-9), best, far])
    assert [row["job"]["rate"] for row in level] == [3e-4, 1e-3]
    assert rates.best_rate(level, run) == 3e-4  # 0.4 + 0.4 against 0.5 + 0.2
    assert [(j.rate, j.seed, j.validate) for j in asked] == [(3e-4, 1, True), (1e-3, 1, True)]
    asked.clear()
    alone = rates.contenders([own(3e-4, 0.4, 0.3), best, far, own(1e-4, math.nan)])
    assert rates.best_rate(alone, run) == 1e-3
    assert not asked


def test_lines_of_another_version_are_not_taken_for_runs(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    """A line whose job lacks a field, or has one more, is another run; so is a torn line."""
    jobs = modules["jobs"]
    job = jobs.Job("carry", "gvpo", 1e-3, 1)
    line = {"job": asdict(job), "objective": 1.0}
    older = {**line, "job": {k: v for k, v in line["job"].items() if k != "imitation"}}
    newer = {**line, "job": {**line["job"], "start": "policy"}}
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join([json.dumps(older), json.dumps(newer), json.dumps(line)[:40]]))
    assert jobs._done(path) == {}
    path.write_text(json.dumps(line) + "\n")
    assert list(jobs._done(path)) == [job.key]


def test_a_plan_names_known_losses_and_fits_its_time(modules: dict[str, ModuleType]) -> None:
    """A rate costs 3.4 runs: three, and a fourth for some. A run takes 9 CPU seconds: on two cores
    750 runs are 56 minutes, and 100 runs with the 3 minutes of models are 11."""
    plan, study, world = (modules[name] for name in ("plan", "study", "world"))
    for entries, cases, most in (
        (plan.short_plan(study.SHORT_TASKS), 0, 100),
        (plan.full_plan(list(modules["tasks"].TASKS)), 6, 750),
    ):
        assert len({entry.name for entry in entries}) == len(entries)
        jobs = {entry.point.job.key: entry.point.job for entry in entries}
        assert {job.loss for job in jobs.values()} <= set(LOSS_TYPES)
        assert {name for job in jobs.values() for name in job.mix} <= {*(*world.KEPT, *world.MIXED)}
        searches = cases * (len(modules["search"].grid("carry", 2)) + 10)
        tests = sum(len(entry.seeds) for entry in entries)
        assert 3.4 * len(jobs) + tests + searches <= most
    chosen = plan.comparisons(entries[:1], {entries[0].name: 1e-3})
    assert [(label, job.seed) for _, label, job in chosen][:2] == [("untouched", 2), ("gvpo", 2)]


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
    jobs.N_HELD_OUT = learn.N_HELD_OUT = 8
    learn.GROUPS_PER_STEP = 4
    folder = Path(sys.argv[1])
    study.make_models("carry", folder / "carry")
    runner = study.Runner(folder)
    plain = jobs.Job("carry", "gvpo", 1e-3, 1, steps=6)
    others = (
        *({"rounds": 2}, {"warm_rate": 1e-2}, {"loss": "none"}, {}),
        {"imitation": "auto", "task": "carry"},
    )
    print(json.dumps([runner(replace(plain, **other)) for other in ({}, *others)]))


def test_a_run_at_its_smallest_is_the_same_twice(tmp_path: Path, server: ForkServer) -> None:
    """Models made, a log drawn, a policy trained and judged; untouched, its log-ratios are 0."""
    status, output = server.run([tmp_path], program=f"{__name__}:{smallest.__name__}")
    assert status == 0, output
    first, rounds, warm, untouched, again, recommended = json.loads(output.splitlines()[-1])
    assert untouched["kl"] == pytest.approx(0, abs=1e-5)
    assert untouched["explained_variance"] == pytest.approx(0, abs=1e-4)
    kinds = (first, rounds, warm, untouched, recommended)
    assert len({one["log_mass"] for one in kinds}) == 5
    assert first["alpha"] == 0 < recommended["alpha"]
    del first["cpu_seconds"], again["cpu_seconds"]
    assert first == again
