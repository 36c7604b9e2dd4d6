"""Where trials tell nothing, `tune` proposes nothing and says so in its exit status and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gvpo_offline.cli import main
from gvpo_offline.commands.tune import TuneReport, _write
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.exit_status import UNDECIDED
from gvpo_offline.store.survey import Survey
from gvpo_offline.tune.doubts import doubts_of
from gvpo_offline.tune.search import HIGHEST_RUNG, Proposal, Trial, grid_rate, lowest_rung


def metrics(explained: float, gain: float) -> dict[str, float]:
    return {
        "explained_variance": explained,
        "loss": 1.0,
        "likely_reweighted_reward_mean": 0.5 + gain,
        "likely_reward_mean": 0.5,
        "likely_log_mass_mean": 0.0,
    }


def proposal(*figures: tuple[float, float], chosen: int = 0, rate: float = 1e-4) -> Proposal:
    """Trials with (explained variance, gain) at rates 1e-4, 2e-4 … and beta 0.2."""
    trials = tuple(
        Trial(0.2, rate * (number + 1), 50, metrics(*own)) for number, own in enumerate(figures)
    )
    return Proposal(0.2, trials[chosen].learning_rate, trials)


def kinds(found: Proposal, **changes: Any) -> list[str]:
    given: dict[str, Any] = {
        "betas": (0.1, 0.2, 0.4),
        "largest_rate": 1e-3,
        "steps": 50,
        "run_steps": 400,
        "loss_type": "gvpo",
        **changes,
    }
    return [own.kind for own in doubts_of(found, **given)]


def test_which_doubts_there_are() -> None:
    assert kinds(proposal((0.3, 0.1), (0.1, 0.05))) == []
    assert kinds(proposal((0.0, 0.1), (-0.2, 0.05))) == ["nothing_explained"]
    assert kinds(proposal((-0.1, 0.2), (0.3, 0.1))) == ["explains_nothing"]
    assert kinds(proposal((0.3, 0.0), (0.1, -0.1))) == ["nothing_gained"]
    assert kinds(proposal((-0.3, -0.1))) == ["nothing_explained", "nothing_gained"]
    # The explained variance is no criterion of other losses.
    assert kinds(proposal((-0.3, 0.1)), loss_type="rft") == []
    assert kinds(proposal((0.3, 0.1)), betas=(0.2, 0.4)) == ["at_end"]
    assert kinds(proposal((0.3, 0.1)), betas=(0.2,)) == []
    for rung in (lowest_rung(1e-3), HIGHEST_RUNG):
        assert kinds(proposal((0.3, 0.1), rate=grid_rate(1e-3, rung))) == ["at_end"]


def test_advice_says_what_caps_it() -> None:
    """50 of 400 steps can be raised; trials as long as the run cannot."""

    def text(run_steps: int) -> str:
        (own,) = doubts_of(
            proposal((-0.1, 0.2)),
            betas=(0.2,),
            largest_rate=1e-3,
            steps=50,
            run_steps=run_steps,
            loss_type="gvpo",
        )
        return own.text

    assert "raise tune_steps (the run has 400 steps, which cap it)" in text(400)
    assert "whose 50 steps cap tune_steps: raise max_steps or num_train_epochs" in text(50)


def report_of(found: Proposal, folder: Path) -> TuneReport:
    doubts = doubts_of(
        found, betas=(0.1, 0.2, 0.4), largest_rate=1e-3, steps=50, run_steps=50, loss_type="gvpo"
    )
    told = not any(own.nothing_told for own in doubts)
    file = folder / "proposed.yaml" if told else None
    return TuneReport(found, 2.0, (0.1, 0.2, 0.4), 1e-3, 50, 12, 50, doubts, file)


@pytest.mark.parametrize("told", [True, False])
def test_what_is_printed_written_and_returned(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A proposal of an earlier search must not stay where this one tells nothing."""
    (tmp_path / "proposed.yaml").write_text("beta: 9\n")
    report = report_of(proposal((0.3 if told else -0.3, 0.1)), tmp_path)
    _write(report, tmp_path)
    monkeypatch.setattr("gvpo_offline.commands.tune.run_tune", lambda **given: report)
    argv = ["tune", "--model_name_or_path", "m", "--dataset", "d", "--output_dir", str(tmp_path)]
    assert main(argv) == (0 if told else UNDECIDED)
    *lines, last = capsys.readouterr().out.strip().split("\n")
    found = json.loads(last)
    assert found["told"] is told
    assert found["beta"] == (0.2 if told else None)
    assert found["learning_rate"] == (1e-4 if told else None)
    assert [own["kind"] for own in found["doubts"]] == ([] if told else ["nothing_explained"])
    assert any(line.startswith("*") for line in lines) is told
    assert any(line.startswith("next: ") for line in lines) is told
    assert (tmp_path / "proposed.yaml").exists() is told
    assert json.loads((tmp_path / "tune.json").read_text())["told"] is told


def test_too_few_to_tell_is_said_before_a_model_loads(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model does not exist, and is not looked for."""
    from support.training import scored_dataset

    root = scored_dataset(tmp_path / "data", tiny_model_dir, 24).root
    argv = ["tune", "--model_name_or_path", str(tmp_path / "none"), "--dataset", str(root)]
    argv += ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--groups_per_step", "1"]
    assert main([*argv, "--eval_fraction", "0.15", "--max_steps", "40"]) == 1
    assert "too few to tell" in capsys.readouterr().err
    assert main([*argv, "--eval_fraction", "0.5", "--max_steps", "19"]) == 1
    assert "received a run of 19 steps" in capsys.readouterr().err


def test_equal_rewards_do_not_count() -> None:
    """Of 9 held-out groups, 2 with equal rewards leave 7."""
    from gvpo_offline.commands.tune import check_enough, check_steps

    counts = Survey(equal_reward_groups=2)
    counts.group_sizes[4] = 9
    with pytest.raises(DataError, match="received 7, which are too few to tell"):
        check_enough(counts)
    counts.group_sizes[4] = 10
    check_enough(counts)
    with pytest.raises(ConfigError, match="at least 20 steps"):
        check_steps(19)
