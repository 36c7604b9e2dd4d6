"""The first sentence of a run's page, and the settings that differ between runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.made_run import append, event, held_out_line, sampled, settings, training_line

from gvpo_offline.report.page.blocks import Notice
from gvpo_offline.report.run.build import run_report


def made(folder: Path, *held_out: Any, ends: bool = True, about: Any = None) -> Path:
    """A run with these held-out lines, at the steps 1, 2, …, each after a line of training."""
    append(folder, "events.jsonl", [event(0, "start", steps=len(held_out) or 1)])
    lines = [training_line(1, 0.1, 0.2)]
    for step, own in enumerate(held_out, 1):
        lines += [training_line(step, 0.1, 0.2)] if step > 1 else []
        lines.append(own(step))
    append(folder, "metrics.jsonl", lines)
    if ends:
        append(folder, "events.jsonl", [event(9, "end", complete=True, error=None)])
    (folder / "gvpo_run.json").write_text(json.dumps(about or settings()))
    return folder


def explained(*values: float) -> list[Any]:
    return [lambda step, own=own: held_out_line(step, 0.1, own) for own in values]


def first_block(run: Path) -> Notice:
    overview = run_report([run]).page.sections[0]
    assert overview.id == "overview"
    block = overview.blocks[0]
    assert isinstance(block, Notice)
    return block


@pytest.mark.parametrize(
    ("values", "severity", "said"),
    [
        ((0.1, 0.3), "note", "The policy learns what holds for held-out groups"),
        ((0.3, 0.2), "warning", "overfits: explained variance (held out) fell from 0.3 at step 1"),
        ((-0.2, 0.0), "warning", "no better than the reference"),
        # Below the reference weighs more than the way there.
        ((0.4, -0.1), "warning", "is -0.1, not above 0"),
    ],
)
def test_the_first_block_says_whether_the_run_goes_well(
    tmp_path: Path, values: tuple[float, ...], severity: str, said: str
) -> None:
    found = first_block(made(tmp_path / "run", *explained(*values)))
    assert (found.severity, said in found.text) == (severity, True), found
    assert bool(found.remedy) == (severity != "note")


def test_a_run_that_trains_says_so_far(tmp_path: Path) -> None:
    found = first_block(made(tmp_path / "run", *explained(0.1, 0.3), ends=False))
    assert found.text.startswith("So far: The policy learns")


def test_nothing_held_out_is_no_success(tmp_path: Path) -> None:
    found = first_block(made(tmp_path / "run"))
    assert found.severity == "warning"
    assert "No held-out figures" in found.text


def test_an_error_comes_before_everything_else(tmp_path: Path) -> None:
    run = made(tmp_path / "run", *explained(0.1, 0.3), ends=False)
    append(run, "events.jsonl", [event(2, "end", complete=False, error="StorageError: no room")])
    assert first_block(run).text.startswith(
        "Training ended with an error at step 2: StorageError: no room"
    )
    other = made(tmp_path / "other", lambda step: held_out_line(step, float("nan"), 0.3))
    text = (other / "metrics.jsonl").read_text().replace("NaN", "null")
    (other / "metrics.jsonl").write_text(text)
    found = first_block(other)
    assert (found.severity, "held out) is not finite since step 1" in found.text) == ("error", True)


def test_a_fall_of_the_sampled_reward_beyond_its_errors_is_a_warning(tmp_path: Path) -> None:
    """0.8 to 0.5 with errors of 0.1: 0.3 is more than 2 sqrt(0.02) = 0.283; to 0.55 it is not."""
    for last, severity in ((0.5, "warning"), (0.55, "note")):
        run = made(
            tmp_path / str(last),
            lambda step: held_out_line(step, 0.1, 0.1, **sampled(0.8, 0.1)),
            lambda step, last=last: held_out_line(step, 0.1, 0.2, **sampled(last, 0.1)),
        )
        assert first_block(run).severity == severity


def test_another_loss_is_judged_by_its_held_out_loss(tmp_path: Path) -> None:
    for last, severity in ((0.6, "note"), (0.8, "warning")):
        run = made(
            tmp_path / str(last),
            lambda step: held_out_line(step, 0.69, -3.0),
            lambda step, last=last: held_out_line(step, last, -9.0),
            about=settings(loss_type="dpo"),
        )
        assert first_block(run).severity == severity


def test_each_of_several_runs_has_its_sentence(tmp_path: Path) -> None:
    runs = [made(tmp_path / name, *explained(0.1, own)) for name, own in (("a", 0.3), ("b", -1.0))]
    overview = next(own for own in run_report(runs).page.sections if own.id == "overview")
    texts = [own.text for own in overview.blocks[:2] if isinstance(own, Notice)]
    assert [text[:2] for text in texts] == ["a:", "b:"]


def test_unset_settings_and_what_follows_from_settings_are_no_difference(tmp_path: Path) -> None:
    """A setting that one run leaves unset and the other does not name would be a row of dashes."""
    one = settings(beta=0.5, max_prompts=None, tags="None", order_by=[])
    other = settings(beta=0.25)
    one["order"], other["order"] = {"n_draws": 1}, {"n_draws": 2}
    one["data"]["datasets"] = [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 1.0}]
    other["data"]["datasets"] = [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 3.0}]
    runs = [
        made(tmp_path / name, *explained(0.1), about=own)
        for name, own in (("one", one), ("other", other))
    ]
    assert run_report(runs).facts["differing_settings"] == {
        "training.beta": [0.5, 0.25],
        "data.datasets.2.weight": [1.0, 3.0],
    }
