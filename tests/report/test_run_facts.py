"""What a page says about runs, against the files by a second path."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made_run import (
    HOSTILE,
    append,
    event,
    held_out_line,
    make_run,
    residual,
    sample,
    sampled,
    training_line,
)
from support.training import scored_dataset, trainer_of

from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.report.page.blocks import Chart, Notice, Section, Table, Text
from gvpo_offline.report.report import Report
from gvpo_offline.report.run.build import run_report
from gvpo_offline.report.run.curves import MOST_ROWS, Band, Curve, curve_chart, thinned
from gvpo_offline.report.run.files import names_of

BEFORE = Path(__file__).parents[1] / "data" / "before"


def section(report: Report, identifier: str) -> Section:
    return next(own for own in report.page.sections if own.id == identifier)


def blocks(report: Report, kind: type) -> dict[str, Any]:
    return {
        own.id: own for part in report.page.sections for own in part.blocks if isinstance(own, kind)
    }


def test_the_figures_are_those_of_the_logged_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    facts = run_report([run]).facts["runs"][0]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    own, judged = facts["sets"]
    assert (own["name"], judged["name"]) == ("training", "held out")
    for name in ("loss", "explained_variance", "best_log_ratio_mean", "likely_log_mass_mean"):
        assert own["first"][name] == training[0][name]
        assert own["last"][name] == training[-1][name]
        assert judged["last"][name] == held_out[-1][f"eval_{name}"]
    assert judged["best_explained_variance"] == {"value": pytest.approx(0.3), "step": 10}
    assert own["least_loss"] == {"value": 0.1, "step": 10}
    assert judged["last"]["sampled_reward"] == pytest.approx(0.4)
    rates = sorted(line["tokens_per_second"] for line in training)
    assert facts["tokens_per_second"] == (rates[4] + rates[5]) / 2
    # 80 draws in steps of 8 are 10 steps, as the start event says too.
    assert (facts["step"], facts["steps"], facts["restarts"]) == (10, 10, 1)
    assert (facts["state"], facts["seconds"], facts["beta"]) == ("finished", 90.0, 0.5)
    assert facts["warnings"] == [
        {"step": 6, "text": "step 6, in training: it is doubtful. What helps: waiting"}
    ]


def test_charts_hold_the_logged_values_and_pin_the_warnings(tmp_path: Path) -> None:
    report = run_report([make_run(tmp_path / "run")])
    chart = blocks(report, Chart)["chart-loss"]
    values = {
        (row["groups"], row["step"]): row["value"] for row in chart.rows if row["value"] is not None
    }
    assert values == {
        **{("training", step): 1.0 / step for step in range(1, 11)},
        **{("held out", step): 2.0 / step for step in (5, 10)},
    }
    pins = [row for row in chart.rows if row["warning"] is not None]
    assert [(row["step"], row["value"]) for row in pins] == [(6, None)]
    assert "doubtful" in str(pins[0]["warning"])
    assert len({tuple(row) for row in chart.rows}) == 1, "rows have the same fields"
    assert "training: 1 at step 1, 0.1 at step 10" in chart.summary
    assert "held out: 0.4 at step 5, 0.2 at step 10" in chart.summary


def test_rewards_of_answers_have_a_band_of_one_standard_error(tmp_path: Path) -> None:
    chart = blocks(run_report([make_run(tmp_path / "run")]), Chart)["chart-sampled-reward"]
    found = [(row["step"], row["low"], row["value"], row["high"]) for row in chart.rows]
    assert found == [
        (5, pytest.approx(0.29), pytest.approx(0.3), pytest.approx(0.31)),
        (10, pytest.approx(0.39), pytest.approx(0.4), pytest.approx(0.41)),
    ]
    marks = [layer["mark"]["type"] for layer in chart.spec["layer"]]
    assert marks == ["area", "rule", "line"]


def test_bands_are_the_thresholds_of_the_warnings(tmp_path: Path) -> None:
    """The best log-ratio lies above -1, so the whole height of its chart is shaded. A chart whose
    values are below the band reaches up to its bound.
    """
    run = make_run(tmp_path / "run")
    append(run, "metrics.jsonl", [training_line(11, 0.1, -0.9, likely_log_mass_mean=-5.0)])
    charts = blocks(run_report([run]), Chart)

    def shaded(name: str) -> tuple[float, float]:
        layer = charts[name].spec["layer"][0]
        assert layer["mark"] == {"type": "rect", "style": "band"}
        return layer["encoding"]["y"]["datum"], layer["encoding"]["y2"]["datum"]

    low, high = shaded("chart-explained-variance")
    assert low == -0.5
    assert high > 0.5
    # Values of -5 to -0.1; the band of -2 to 1 ends at the margin above them.
    low, high = shaded("chart-likely-log-mass-mean")
    assert low == -2.0
    assert -0.1 < high <= 1.0
    only = curve_chart("c", "t", [Curve("r", "training", [(1, -3.0), (2, -2.5)])], band=Band(-2.0))
    assert only is not None
    domain = only.spec["layer"][1]["encoding"]["y"]["scale"]["domain"]
    assert domain[0] < -3.0 < -2.0 < domain[1]


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf)), max_size=300
    ),
    most=st.integers(2, 50),
)
def test_thinning_keeps_the_extremes_of_every_interval(values: list[float], most: int) -> None:
    """By numpy: the finite values, split into most // 2 parts, keep their least and largest."""
    steps = list(enumerate(values))
    found = thinned(steps, most)
    finite = [(step, value) for step, value in steps if math.isfinite(value)]
    assert len(found) <= max(most, 2)
    assert found == sorted(found)
    assert set(found) <= set(finite)
    if len(finite) <= most:
        assert found == finite
        return
    n = most // 2
    edges = np.arange(n + 1) * len(finite) // n
    for start, stop in itertools.pairwise(edges):
        part = finite[start:stop]
        kept = [value for step, value in found if part[0][0] <= step <= part[-1][0]]
        assert min(kept) == min(value for _, value in part)
        assert max(kept) == max(value for _, value in part)


def test_a_run_of_100000_logged_lines_has_small_charts_that_say_so(tmp_path: Path) -> None:
    n = 100_000
    run = tmp_path / "run"
    append(
        run,
        "metrics.jsonl",
        (
            {"step": step, "loss": -7.0 if step == 54_321 else math.sin(step)}
            for step in range(1, n + 1)
        ),
    )
    append(run, "events.jsonl", [event(0, "start", steps=n)])
    chart = blocks(run_report([run]), Chart)["chart-loss"]
    assert len(chart.rows) <= MOST_ROWS
    assert (54_321, -7.0) in [(row["step"], row["value"]) for row in chart.rows]
    assert "Of 100,000 values of a curve, 2,000 are drawn" in chart.summary


def test_runs_side_by_side_show_first_what_differs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a" / "run", beta=0.5, seed=1, output_dir="a")
    two = make_run(tmp_path / "b" / "run", beta=0.25, output_dir="b")
    report = run_report([one, two])
    assert report.page.sections[0].id == "differences"
    table = report.page.sections[0].blocks[0]
    assert isinstance(table, Table)
    assert [column.title for column in table.columns] == ["setting", "a/run", "b/run"]
    assert table.rows == [["training.beta", "0.5", "0.25"], ["training.seed", "1", None]]
    assert report.facts["differing_settings"] == {
        "training.beta": [0.5, 0.25],
        "training.seed": [1, None],
    }
    figures = blocks(report, Table)["figures"]
    assert [row[0] for row in figures.rows] == ["a/run", "b/run"]
    chart = blocks(report, Chart)["chart-loss"]
    assert {row["run"] for row in chart.rows} == {"a/run", "b/run"}
    line = chart.spec["layer"][0]["encoding"]
    assert (line["color"]["field"], line["strokeDash"]["field"]) == ("run", "groups")
    assert len(
        {
            own.id
            for part in report.page.sections
            for own in (part, *part.blocks)
            if hasattr(own, "id")
        }
    ) == sum(hasattr(own, "id") for part in report.page.sections for own in (part, *part.blocks))


def test_equal_settings_and_runs_without_settings_are_said(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    texts = [own.text for own in run_report([one, two]).page.sections[0].blocks]  # type: ignore[union-attr]
    assert texts == ["All settings are the same."]
    (two / "gvpo_run.json").unlink()
    texts = [own.text for own in run_report([one, two]).page.sections[0].blocks]  # type: ignore[union-attr]
    assert texts == ["Without a file of settings, since they were started in Python: two."]


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/x/run", "b/x/run", "other")]
    assert names_of(paths) == ["a/x/run", "b/x/run", "other"]
    with pytest.raises(ConfigError, match="each run is named once"):
        names_of([tmp_path / "run", tmp_path / "x" / ".." / "run"])


def test_answers_over_time_stand_beside_the_best_logged_one(tmp_path: Path) -> None:
    report = run_report([make_run(tmp_path / "run")])
    first, second = report.page.groups
    assert first.group_id == "group of one"
    assert [(turn.role, turn.text) for turn in first.prompt] == [("user", "one")]
    found = [
        (own.sampler, "".join(token.text for token in own.tokens), own.reward, own.n_tokens)
        for own in first.responses
    ]
    assert found == [
        ("best logged", "the best of one", 1.0, 0),  # its tokens are not in the file
        ("policy at step 5", "answer at 5", 0.5, 7),
        ("policy at step 10", "answer at 10", 1.0, 7),
    ]
    assert len(first.responses[1].tokens) == 7, "the whole answer is shown"
    assert first.numbers == {"last reward": 1.0, "change of reward": 0.5}
    assert list(second.flags) == ["last answer cut", "last answer without reward"]
    assert second.responses[1].truncated
    assert second.responses[1].tokens[0].text == HOSTILE


def test_answers_of_two_runs_stand_together_and_long_histories_are_spread(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    append(two, "samples.jsonl", [sample(step, "one", str(step), 0.0) for step in range(20, 120)])
    report = run_report([one, two])
    names = [own.sampler for own in report.page.groups[0].responses]
    assert names[:3] == ["best logged", "one: policy at step 5", "one: policy at step 10"]
    assert len(names) == 1 + 2 + 8
    assert names[3] == "two: policy at step 5"
    assert names[-1] == "two: policy at step 119"


def test_a_long_answer_is_cut_and_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    append(run, "samples.jsonl", [sample(1, "p", "x" * 30_000, 0.5, length=9_000)])
    append(run, "events.jsonl", [event(1, "start", steps=1)])
    tokens = run_report([run]).page.groups[0].responses[1].tokens
    assert "".join(token.text for token in tokens) == (
        "x" * 20_000 + " … the first 20,000 of 30,000 characters"
    )
    assert [token.special for token in tokens[:2]] == [False, True]
    assert len(tokens) == 9_000


def test_residuals_before_and_after(tmp_path: Path) -> None:
    """The worst groups of the first measurement, and those that are worst at the last one."""
    run = make_run(tmp_path / "run")
    append(run, "residuals.jsonl", [residual(10, "late", 9.0)])
    append(run, "residuals.jsonl", [residual(3, "t", 0.5, groups="training")])
    rows = blocks(run_report([run]), Table)["residuals-1"].rows
    assert [row[:7] for row in rows] == [
        ["held out", "worst", 5, 0.8, 10, 0.4, pytest.approx(-0.4)],
        ["held out", "other", 5, 0.4, 10, 0.2, pytest.approx(-0.2)],
        ["held out", "late", None, None, 10, 9.0, None],
        ["training", "t", 3, 0.5, None, None, None],
    ]
    assert rows[0][7] == "response 0, of a, reward 1, residual +0.4, log-ratio +0.5 nats"


def test_samplers_have_their_first_and_last_log_ratio(tmp_path: Path) -> None:
    table = blocks(run_report([make_run(tmp_path / "run")]), Table)["samplers-1"]
    assert table.rows == [
        ["s0", 0.9, 0.5, 1.0, 0.5, 0.5],
        ["s1", 0.1, -0.5, -1.0, -0.5, -0.5],
    ]


# ---- verdicts ----


def verdict(run: Path) -> str:
    return " ".join(run_report([run]).facts["runs"][0]["verdict"])


def test_the_verdict_names_overfitting_and_its_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, value in ((1, 0.1), (2, 0.4), (3, 0.3)):
        append(run, "metrics.jsonl", [training_line(step, 1.0, 0.5), held_out_line(step, 1, value)])
    assert "0.3, after 0.4 at step 2: since then the policy overfits" in verdict(run)
    append(run, "metrics.jsonl", [held_out_line(4, 1.0, 0.39)])
    assert "Explained variance (held out): 0.39, the best 0.4 at step 2." in verdict(run)


def test_the_verdict_names_a_policy_that_learned_nothing_held_out(tmp_path: Path) -> None:
    append(tmp_path / "run", "metrics.jsonl", [held_out_line(1, 1.0, -0.2)])
    assert "it never rose above 0" in verdict(tmp_path / "run")


@pytest.mark.parametrize(
    ("last", "said"), [(0.24, "within two standard errors"), (0.5, "0.3 more")]
)
def test_the_verdict_weighs_rewards_by_their_errors(tmp_path: Path, last: float, said: str) -> None:
    """Errors of 0.03 and 0.04 are 0.05 together: a change of 0.04 is within two of it."""
    run = tmp_path / "run"
    append(run, "metrics.jsonl", [held_out_line(1, 1.0, 0.1, **sampled(0.2, 0.03))])
    append(run, "metrics.jsonl", [held_out_line(2, 1.0, 0.2, **sampled(last, 0.04))])
    assert said in verdict(run)


def test_a_loss_that_is_not_finite_is_said_with_its_first_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    append(run, "metrics.jsonl", [training_line(11, None, 0.1), training_line(12, None, 0.1)])
    assert "was not finite in 2 lines, first at step 11" in verdict(run)
    facts = run_report([run]).facts["runs"][0]["sets"][0]
    assert facts["last"]["loss"] is None, "JSON has no NaN"
    assert facts["least_loss"] == {"value": 0.1, "step": 10}


# ---- folders in every state ----


def test_a_run_that_trains_or_was_killed_is_open(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 0.0')
    report = run_report([run])
    facts = report.facts["runs"][0]
    assert (facts["state"], facts["step"]) == ("open", 10)
    assert "training goes on, or was killed" in facts["verdict"][0]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("}\n")
    assert run_report([run]).facts["runs"][0]["step"] == 11


def test_a_run_that_failed_says_its_error_and_how_to_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    append(run, "events.jsonl", [event(10, "end", complete=False, error="OSError: no disk")])
    report = run_report([run])
    assert report.facts["runs"][0]["state"] == "failed"
    notices = [own for own in section(report, "overview").blocks if isinstance(own, Notice)]
    assert notices[0].severity == "error"
    assert "OSError: no disk" in notices[0].text
    assert "resume_from_checkpoint: auto" in notices[0].remedy
    append(run, "events.jsonl", [event(10, "resume", steps=10)])
    assert run_report([run]).facts["runs"][0]["state"] == "open"


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "gvpo_run.json"])
def test_one_file_alone_makes_a_page(tmp_path: Path, name: str) -> None:
    whole, run = make_run(tmp_path / "whole"), tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / name, run / name)
    report = run_report([run])
    assert section(report, "overview").blocks
    assert json.loads(report.json_text())["runs"][0]["name"] == "run"


def test_a_run_without_evaluation_or_samples_says_that_training_does_not_tell(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    append(run, "metrics.jsonl", [training_line(1, 1.0, 0.2)])
    append(run, "events.jsonl", [event(0, "start", steps=1)])
    report = run_report([run])
    assert "Nothing is held out, so it does not tell" in verdict(run)
    assert report.page.groups == []
    assert {own.id for own in report.page.sections}.isdisjoint({"answers", "residuals", "samplers"})


def test_a_run_of_an_earlier_version_opens_with_the_warnings_of_this_one(tmp_path: Path) -> None:
    run = shutil.copytree(BEFORE / "run", tmp_path / "run")
    report = run_report([run])
    facts = report.facts["runs"][0]
    assert not facts["warnings_recorded"]
    assert facts["checkpoints"][0]["step"] == 2
    assert facts["step"] == 2
    texts = [own.text for own in section(report, "overview").blocks if isinstance(own, Notice)]
    assert any("no events.jsonl" in text for text in texts)


def test_a_search_shows_its_trials_and_proposal(tmp_path: Path) -> None:
    tuned = shutil.copytree(BEFORE / "tuned", tmp_path / "tuned")
    unfinished = run_report([tuned]).facts["searches"][0]
    files = list((tuned / "tune" / "trials").glob("trial-*.json"))
    assert not unfinished["finished"]
    assert len(unfinished["trials"]) == len(files) > 0
    content = {
        "beta": 0.5,
        "learning_rate": 0.01,
        "steps": 20,
        "held_out_groups": 9,
        "trials": [
            {"beta": 0.5, "learning_rate": 0.01, "metrics": {"explained_variance": 0.3}},
            {"beta": 0.5, "learning_rate": 0.1, "metrics": {"explained_variance": None}},
        ],
    }
    (tuned / "tune" / "tune.json").write_text(json.dumps(content))
    for path in (tuned, tuned / "tune"):
        report = run_report([path])
        rows = blocks(report, Table)["trials-1"].rows
        assert [row[:4] for row in rows] == [
            ["proposed", 0.5, 0.01, 0.3],
            ["", 0.5, 0.1, None],
        ]
        assert [
            row["explained variance"] for row in blocks(report, Chart)["trials-chart-1"].rows
        ] == [0.3]
    (tuned / "tune" / "tune.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"tune\.json"):
        run_report([tuned])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither\. Name the output_dir of a run"):
        run_report([tmp_path])
    with pytest.raises(DataError, match="no such folder"):
        run_report([make_run(tmp_path / "run"), tmp_path / "none"])


def test_a_broken_line_is_an_error_with_its_place(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "events.jsonl").write_text("{}\n" + (run / "events.jsonl").read_text())
    with pytest.raises(IntegrityError, match=r"events\.jsonl.*in line 1"):
        run_report([run])


def test_hostile_names_and_texts_are_data(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>&amp;\x1b[31m", model=HOSTILE)
    append(run, "metrics.jsonl", [held_out_line(11, 1.0, 0.1, **{f"eval_reward/{HOSTILE}": 1.0})])
    append(run, "events.jsonl", [event(11, "warning", text=HOSTILE)])
    report = run_report([run])
    assert report.facts["runs"][0]["name"] == "<b>&amp;\x1b[31m"
    assert HOSTILE in [row[0] for row in blocks(report, Table)["samplers-1"].rows]
    texts = [own for part in report.page.sections for own in part.blocks if isinstance(own, Text)]
    assert texts
    ids = [
        own.id
        for part in report.page.sections
        for own in (part, *part.blocks)
        if hasattr(own, "id")
    ]
    assert all(own.replace("-", "").isalnum() for own in ids)


def test_a_real_run_has_a_page_with_the_figures_of_its_history(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    dataset = scored_dataset(tmp_path / "data", tiny_model_dir, 24)
    trainer = trainer_of(
        tiny_model_dir,
        dataset,
        tmp_path / "run",
        eval_dataset=dataset,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer.train()
    facts = run_report([tmp_path / "run"]).facts["runs"][0]
    history = trainer.state.log_history
    evaluated = [line for line in history if "eval_loss" in line]
    assert (facts["state"], facts["step"]) == ("finished", 3)
    assert facts["sets"][1]["last"]["explained_variance"] == pytest.approx(
        evaluated[-1]["eval_explained_variance"]
    )
    losses = {line["step"]: line["loss"] for line in history if "loss" in line}
    chart = blocks(run_report([tmp_path / "run"]), Chart)["chart-loss"]
    found = {
        row["step"]: row["value"]
        for row in chart.rows
        if row["groups"] == "training" and row["value"] is not None
    }
    assert found == losses
