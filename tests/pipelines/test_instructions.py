"""`pipelines/instructions`: its constraints, prompts, log, runs and report."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support.fork_server import ForkServer

from gvpo_offline import open_dataset

FOLDER = Path(__file__).parents[2] / "pipelines" / "instructions"
NAMES = ("constraints", "jobs", "models", "person", "prompts", "report", "run", "stages")


@pytest.fixture(scope="module")
def pipeline() -> Iterator[dict[str, ModuleType]]:
    """The modules of the pipeline by name; other pipelines have modules of the same names."""
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.mark.parametrize(
    ("constraint", "meets", "fails"),
    [
        ({"kind": "at_most", "n": 4}, "Tea isn't cold, ever.", "Tea is not cold at all."),
        ({"kind": "between", "n": 3}, "It is hot, wet and good.", "It is hot and wet and so good."),
        ({"kind": "bullets", "n": 2}, "- tea is hot\n* so is soup\n", "- tea is hot\nso is soup"),
        ({"kind": "bullets", "n": 2}, "- tea\n- soup", "- tea\n- soup\n- bread"),
        ({"kind": "json", "keys": ["a", "b"]}, '{"b": "hot", "a": "tea"}', '{"a": "tea"}'),
        ({"kind": "json", "keys": ["a", "b"]}, '{"a": "x", "b": "y"}', '{"a": "x", "b": 1}'),
        ({"kind": "json", "keys": ["a", "b"]}, ' {"a": "x", "b": "y"}', 'A: {"a": "x", "b": "y"}'),
        ({"kind": "question"}, "Is tea hot? ", "Is tea hot? Yes."),
        ({"kind": "exclamation"}, "Tea is hot!", "Tea is hot"),
        ({"kind": "lower"}, "tea is hot.", "Tea is hot."),
        ({"kind": "upper"}, "TEA IS 90 DEGREES.", "TEA IS hot."),
        ({"kind": "no_commas"}, "Tea is hot.", "Tea, hot."),
        ({"kind": "required", "word": "cup"}, "A Cup of tea.", "Some cups of tea."),
        ({"kind": "forbidden", "word": "cup"}, "Some cups of tea.", "A CUP of tea."),
    ],
)  # fmt: skip
def test_a_program_checks_each_constraint(
    pipeline: dict[str, ModuleType], constraint: dict[str, Any], meets: str, fails: str
) -> None:
    holds = pipeline["constraints"].KINDS[constraint["kind"]].holds
    assert holds(constraint, meets)
    assert not holds(constraint, fails)


@pytest.mark.parametrize(
    ("text", "gibberish"),
    [
        ("Tea is hot.", False),
        ("", True),
        ("Tea.", True),  # fewer than three words
        ("the tea the tea the tea the tea", True),  # 2 different words of 8
        ("тёплый чай is hot", True),  # 10 of 17 characters are not ASCII
        ("Wopsdelic Nij Gnyn Chij Sati Kaml", True),  # six words and no common one
        ("tea is {{{{{{{{{{{{{", True),  # 5 letters of 18 characters that are no space
        ('{"name": "tea", "reason": "it is hot"}', False),
        ("- tea and more\n- tea and people", False),
    ],
)
def test_gibberish_is_worth_nothing(
    pipeline: dict[str, ModuleType], text: str, gibberish: bool
) -> None:
    constraints = pipeline["constraints"]
    assert constraints.is_gibberish(text) == gibberish
    if gibberish:
        assert constraints.share_met([{"kind": "no_commas"}], text) == 0


def test_the_reward_is_the_share_of_the_constraints(pipeline: dict[str, ModuleType]) -> None:
    """Of three constraints 'Tea is hot.' meets no_commas alone; of answers as messages the text
    counts.
    """
    given = json.dumps([{"kind": "no_commas"}, {"kind": "lower"}, {"kind": "question"}])
    answers = ["Tea is hot.", [{"role": "assistant", "content": "is tea hot?"}]]
    met = pipeline["constraints"].constraints_met(
        completions=answers, constraints=[given, given], topic=["tea", "tea"]
    )
    assert met == [pytest.approx(1 / 3), 1.0]


def test_parts_share_no_prompt_and_no_topic(
    pipeline: dict[str, ModuleType], tmp_path: Path
) -> None:
    """The full sizes; two or three constraints each, and a smaller run has the first prompts."""
    prompts, plans = pipeline["prompts"], pipeline["run"]
    prompts.write_prompts(tmp_path / "full", plans.FULL.prompts, seed=0)
    prompts.write_prompts(tmp_path / "quick", plans.QUICK.prompts, seed=0)
    rows = {
        name: prompts.read_prompts(tmp_path / "full" / f"{name}.jsonl") for name in prompts.SHARES
    }
    assert len(rows["train"]) >= 150
    assert len(rows["test"]) >= 60
    for name, own in rows.items():
        assert len({row["prompt"] for row in own}) == len(own) == plans.FULL.prompts[name]
        assert {len(json.loads(row["constraints"])) for row in own} == {2, 3}
        few = prompts.read_prompts(tmp_path / "quick" / f"{name}.jsonl")
        assert few == own[: len(few)]
    topics = [{row["topic"] for row in own} for own in rows.values()]
    assert sum(map(len, topics)) == len(set.union(*topics))


def test_the_person_meets_what_it_does_not_forget(
    pipeline: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never forgetting, it meets everything but for a forbidden word that its stock phrases or the
    topic happen to contain; forgetting in a fifth of its answers, it meets less.
    """
    prompts, person = pipeline["prompts"], pipeline["person"]
    prompts.write_prompts(tmp_path, {"train": 160, "validation": 0, "test": 0}, seed=1)
    rows = prompts.read_prompts(tmp_path / "train.jsonl")

    def rewards(forgets: float) -> list[float]:
        monkeypatch.setattr(person, "FORGETS", forgets)
        rng, met = random.Random(0), pipeline["constraints"].share_met
        given = [json.loads(row["constraints"]) for row in rows]
        return [
            met(own, person.person(row["topic"], own, rng))
            for row, own in zip(rows, given, strict=True)
        ]

    assert np.mean(rewards(0.0)) > 0.97
    assert 0.85 < np.mean(rewards(0.2)) < 0.97


def test_errors_cover_prompts_and_seeds(pipeline: dict[str, ModuleType]) -> None:
    """Two prompts, two seeds. Means of prompts 0 and 2: variance 2, over P = 2: 1. Means of seeds
    0.5 and 1.5: variance 0.5, over S = 2: 0.25. No residual: 0, 1, 1, 2 less the means is 0.
    Then with residuals of 1: their variance 4 over (P - 1)(S - 1) P S = 4 is 1, so 1 + 0.25 - 1 is
    below the prompts' own 1, which stands.
    """
    estimate = pipeline["report"].estimate
    additive = estimate(np.array([[-0.5, 0.5], [1.5, 2.5]]))
    assert additive.mean == 1
    assert additive.se == pytest.approx(1.25**0.5)
    crossed = estimate(np.array([[-0.5, 0.5], [1.5, 2.5]]) + np.array([[1, -1], [-1, 1]]))
    assert crossed.se == pytest.approx(1.0)
    alone = estimate(np.array([[0.0], [1.0], [2.0], [3.0]]))
    assert alone.se == pytest.approx((5 / 3 / 4) ** 0.5)
    assert str(alone) == "+1.500 ± 0.645"


def test_errors_are_those_of_repeated_studies(pipeline: dict[str, ModuleType]) -> None:
    """Prompts of deviation 0.3, seeds of 0.05, residuals of 0.2; P = 64, S = 4: the mean's variance
    is 0.09/64 + 0.0025/4 + 0.04/256 = 0.0021875. The mean of 400 estimated variances is within
    three of its standard errors (those of a variance of 3 degrees of freedom, for the seeds).
    """
    rng = np.random.default_rng(0)
    truth, estimates = 0.0021875, []
    for _ in range(400):
        prompts_P, seeds_S = rng.normal(0, 0.3, (64, 1)), rng.normal(0, 0.05, (1, 4))
        values_PS = prompts_P + seeds_S + rng.normal(0, 0.2, (64, 4))
        estimates.append(pipeline["report"].estimate(values_PS).se ** 2)
    error = np.std(estimates, ddof=1) / 20
    assert abs(np.mean(estimates) - truth) < 3 * error


def row_of(job: Any, rewards: list[float], kl: float = 0.0) -> dict[str, Any]:
    """A finished run's line, with one reward for each prompt."""
    prompts = [
        {"prompt": str(number), "reward": reward, "kl": kl, "length": 10.0, "truncated": 0.0}
        for number, reward in enumerate(rewards)
    ]
    sampled = {"sampled_reward": rewards[0], "sampled_kl": kl, "sampled_truncated": 0.0}
    cpu = {"train": 1.0}
    row = {"job": asdict(job), "prompts": prompts, "sampled": sampled, "cpu_seconds": cpu}
    return {**row, "training": {"alpha": 0.5}}


def test_a_run_is_a_line_and_is_not_repeated(
    pipeline: dict[str, ModuleType], tmp_path: Path
) -> None:
    """A killed run leaves part of a line; its job runs again, and later lines stay whole."""
    jobs = pipeline["jobs"]
    first, second = (jobs.Job("gvpo", 1e-6, seed, True, "test", 2, 1) for seed in (0, 1))
    path, done = tmp_path / "runs.jsonl", []

    def runner(job: Any) -> dict[str, Any]:
        done.append(job.seed)
        return row_of(job, [0.5])

    jobs.run_all([first], runner, path, 1)
    with path.open("a") as file:
        file.write('{"job": {"loss": "gv')
    rows = jobs.run_all([second, first], runner, path, 2)
    assert done == [0, 1]
    assert [row["job"]["seed"] for row in rows] == [1, 0]
    assert set(jobs.rows_of(path)) == {first.key, second.key}


def test_a_failed_run_is_reported_and_the_finished_ones_are_kept(
    pipeline: dict[str, ModuleType], tmp_path: Path
) -> None:
    jobs, stages = pipeline["jobs"], pipeline["stages"]
    wanted = [jobs.Job("gvpo", 1e-6, seed, True, "test", 2, 1) for seed in (0, 1)]

    def runner(job: Any) -> dict[str, Any]:
        if job.seed == 1:
            raise stages.CommandError("train failed; see train.log")
        return row_of(job, [0.5])

    with pytest.raises(stages.CommandError, match=r"see train\.log"):
        jobs.run_all(wanted, runner, tmp_path / "runs.jsonl", 1)
    assert set(jobs.rows_of(tmp_path / "runs.jsonl")) == {wanted[0].key}


def test_a_stage_runs_once(pipeline: dict[str, ModuleType], tmp_path: Path) -> None:
    """Its seconds are remembered; another command under its name is refused; a failure names the
    log and leaves no record.
    """
    stages = pipeline["stages"]
    own = stages.Stages(tmp_path)
    touched = tmp_path / "touched"
    command = ["-c", f"open({str(touched)!r}, 'x').close()"]
    assert own.run("touch", command) > 0
    assert own.run("touch", command) > 0  # a second 'x' would fail
    with pytest.raises(stages.CommandError, match="another command"):
        own.run("touch", ["-c", "pass"])
    with pytest.raises(stages.CommandError, match=r"fail\.log"):
        own.run("fail", ["-c", "raise SystemExit('no')"])
    assert (tmp_path / "fail.log").read_text().strip() == "no"
    assert not (tmp_path / "fail.done.json").exists()


def test_every_loss_takes_the_best_of_three_rates_within_a_limit(
    pipeline: dict[str, ModuleType],
) -> None:
    """The reward of rate r peaks at 3e-6 for gvpo, 1e-5 for the others. The KL is r / 1e-5 nats,
    but for rft, whose 1e-5 gives 10 and 3e-5 gives 30: it takes 3e-6, with 3 > 1.5 nats.
    """
    run, jobs = pipeline["run"], pipeline["jobs"]
    tried: list[tuple[str, float, float]] = []

    def fake(wanted: list[Any]) -> list[dict[str, Any]]:
        tried.extend((job.loss, job.rate, job.settings.get("beta", 0)) for job in wanted)
        rows = []
        for job in wanted:
            distance = abs(np.log(job.rate / (3e-6 if job.loss == "gvpo" else 1e-5)))
            kl = job.rate * (1e6 if job.loss == "rft" else 1e5)
            rows.append(row_of(job, [-float(distance)], kl))
        return rows

    best = run.tune_rates(run.FULL, fake)
    assert best == {loss: 3e-6 if loss in ("gvpo", "rft") else 1e-5 for loss in jobs.LOSSES}
    assert len(tried) == len(set(tried)) == 3 * len(jobs.LOSSES) + 2
    # `QUICK` tries gvpo alone; the others take the last rate.
    tried.clear()
    assert run.tune_rates(run.QUICK, fake)["rft"] == 1e-5
    assert {loss for loss, *_ in tried} == {"gvpo"}


def test_rates_of_an_earlier_run_are_of_every_loss(
    pipeline: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    run, losses = pipeline["run"], pipeline["jobs"].LOSSES
    rates = dict.fromkeys(losses, 1e-05)
    assert run.parse(["--rates", json.dumps(rates)]).rates == rates
    with pytest.raises(SystemExit):
        run.parse(["--rates", '{"gvpo": 1e-5}'])
    assert "--rates needs a rate for each of gvpo, recommended, rft" in capsys.readouterr().err


def test_the_report_pairs_runs_by_prompt_and_seed(
    pipeline: dict[str, ModuleType], tmp_path: Path
) -> None:
    """Two prompts of very different difficulty, and each gains 0.1: the gain has no error, the
    reward has. reward - beta KL at KL 0.2 is 0.6 - 0.15 * 0.2 = 0.57. An unfinished run is left
    out.
    """
    jobs, report = pipeline["jobs"], pipeline["report"]
    runs = {"untouched": (0.0, 0.0), "gvpo": (0.1, 0.2), "recommended": (0.1, 0.2)}
    wanted, lines = [], []
    for loss, (gain, kl) in runs.items():
        for seed in (0,) if loss == "untouched" else (0, 1):
            job = jobs.Job(loss, 0.0, seed, True, "test", 2, 2)
            wanted.append(job)
            lines.append(row_of(job, [0.1 + gain, 0.9 + gain], kl))
    unfinished = jobs.Job("rft", 1e-6, 0, True, "test", 2, 2)
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [json.loads(job.key) for job in [*wanted, unfinished]]
    (tmp_path / "comparison.json").write_text(json.dumps(settings))
    found = report.summary(report.read(tmp_path), beta=0.15)
    assert found["gvpo"]["reward"] == pytest.approx(0.6)
    assert found["gvpo"]["reward_se"] == pytest.approx(0.4)  # prompts 0.2 and 1.0: 0.32 / 2, root
    assert found["gvpo"]["gain"] == pytest.approx(0.1)
    assert found["gvpo"]["gain_se"] == pytest.approx(0, abs=1e-6)
    assert found["gvpo"]["objective"] == pytest.approx(0.57)
    assert found["untouched"]["kl"] == 0
    assert "rft" not in found
    assert found["recommended_is"] == {**jobs.LOSSES["recommended"], "alpha": 0.5}
    table = report.table(report.read(tmp_path), beta=0.15)
    assert "| with the person | gvpo |  | 0.600 ± 0.400 | +0.100 ± 0.000 | 0.200 ± 0.000 |" in table


@pytest.fixture
def small(
    pipeline: dict[str, ModuleType],
    server: ForkServer,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder for a run of two losses on a tiny policy; commands run in forked children."""
    run, jobs, stages = (pipeline[name] for name in ("run", "jobs", "stages"))
    losses = {name: jobs.LOSSES[name] for name in ("gvpo", "recommended")}
    sizes = {"train": 8, "validation": 2, "test": 3}
    plan = run.Plan(sizes, 2, ("gvpo",), (1e-5, 1e-4), 2, (0,), 2)
    settings = {"QUICK": plan, "LOSSES": losses, "WITHOUT_PERSON": ("gvpo",), "MAX_NEW_TOKENS": 6}
    for name, value in settings.items():
        monkeypatch.setattr(run, name, value)

    def forked(argv: list[str], log: Path) -> tuple[float, int]:
        command = argv[argv.index("gvpo_offline.cli") + 1 :]
        status, output = server.run(command, cwd=str(FOLDER.parents[1]))
        log.write_text(output, encoding="utf-8")
        return 1.0, status

    monkeypatch.setattr(stages, "_measured", forked)
    folder = tmp_path / "run"
    shutil.copytree(tiny_model_dir, folder / "policy")
    return folder


def test_from_prompts_to_figures_and_again(
    pipeline: dict[str, ModuleType], small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All stages through the command line: seven responses to each training prompt with the person,
    six without; the untouched policy is at KL 0, a trained one is not. Run again, nothing is
    repeated and the last line is the same.
    """
    run = pipeline["run"]
    run.main(["--quick", "--workers", "1", "--output_dir", str(small)])
    last = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(last)
    assert set(found) == {
        *("untouched", "gvpo", "recommended", "without_person", "recommended_is", "beta", "prompts")
    }
    assert found["prompts"] == 3
    assert found["untouched"]["kl"] == pytest.approx(0, abs=1e-4)
    assert found["gvpo"]["kl"] != 0
    assert set(found["without_person"]) == {"gvpo"}
    assert found["recommended_is"]["alpha"] >= 0
    assert 0 <= found["gvpo"]["reward"] <= 1
    assert found["gvpo"]["reward_se"] >= 0
    opened = open_dataset(small / "dataset")
    groups = [group for i in range(opened.n_row_groups) for group in opened.groups(i)]
    assert [sorted(group.samplers) for group in groups] == 8 * [
        ["hot", "hot", "noised", "noised", "person", "prompted", "prompted"]
    ]
    rows = [json.loads(line) for line in (small / "runs.jsonl").read_text().splitlines()]
    assert len(rows) == 6  # two trials, untouched, two losses, one without the person
    assert not list((small / "jobs").glob("*/trained/*.safetensors"))
    logs = list((small / "jobs").glob("*gvpo*without-person*/train.log"))
    assert "responses of hot, prompted, noised" in logs[0].read_text()
    written = (small / "runs.jsonl").stat().st_mtime_ns
    run.main(["--quick", "--workers", "1", "--output_dir", str(small)])
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert (small / "runs.jsonl").stat().st_mtime_ns == written
