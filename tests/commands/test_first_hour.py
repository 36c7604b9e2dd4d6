"""What a new user reads in the first hour: the next step everywhere, and no lines for programs."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from support.importing import write_jsonl

from gvpo_offline.cli import main
from gvpo_offline.commands import console
from gvpo_offline.commands.metric_texts import explained
from gvpo_offline.commands.order_text import step_lines
from gvpo_offline.tune.doubts import doubts_of
from gvpo_offline.tune.search import Proposal, Trial


def test_validate_and_report_name_what_the_dataset_lacks(
    tmp_path: Path,
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dataset with rewards and without a reference: not `train`, but `reference`."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"What is {i}?", "response": text, "reward": reward, "sampler": "a"}
        for i in range(4)
        for text, reward in (("yes", 1.0), ("no", 0.0))
    ]
    flags = ["--inputs", str(write_jsonl(tmp_path / "log.jsonl", rows)), "--output_dir", "my data"]
    own = ["--tokenizer_name_or_path", str(tiny_model_dir), "--show_progress", "false"]
    assert main(["import", *flags, *own]) == 0
    command = shlex.join(
        [
            *("gvpo-offline", "reference", "--dataset", "my data"),
            *("--model_name_or_path", str(tiny_model_dir)),
        ]
    )
    capsys.readouterr()
    assert main(["validate", "my data", "--show_progress", "false"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: {command}"
    assert main(["report", "my data", "--show_progress", "false"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["open my-data-report.html in a browser", f"next: {command}"]


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_for_programs_are_left_out_on_a_terminal(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    console.say_to_programs('{"loss": 1}')
    assert capsys.readouterr().out == ("" if terminal else '{"loss": 1}\n')


def test_a_metric_is_printed_with_its_meaning() -> None:
    assert explained("log_ratio_mean", -1.5, 14) == (
        "  log_ratio_mean         -1.5   mean log-ratio to the reference, nats"
    )
    assert explained("of_another_loss", 2.0, 15) == "  of_another_loss            2"


@pytest.mark.parametrize(("n", "text"), [(1, "1 rank,"), (3, "3 ranks,")])
def test_ranks_are_counted_in_words(n: int, text: str) -> None:
    ranks = {"world_size": n, "max_tokens": 4096, "layout": "padded"}
    lines = step_lines({"step": 1, "steps": 2, "groups": [], "ranks": ranks})
    assert lines[1].startswith(f"computed by {text} in")


def test_a_search_whose_trials_raise_all_responses_says_so() -> None:
    """The score caps the largest ratios: with all log-ratios above 0 it is 0, whatever they fit."""

    def said(log_mass: float) -> str:
        metrics = {
            "explained_variance": 0.4,
            "likely_reweighted_reward_mean": 0.5,
            "likely_reward_mean": 0.5,
            "likely_log_mass_mean": log_mass,
        }
        found = Proposal(0.2, 1e-4, (Trial(0.2, 1e-4, 50, metrics),))
        (doubt,) = doubts_of(
            found,
            betas=(0.1, 0.2, 0.4),
            largest_rate=1e-3,
            steps=50,
            run_steps=50,
            loss_type="gvpo",
        )
        assert doubt.kind == "nothing_gained"
        return doubt.text

    assert "raise the log-probs of good and bad responses alike (log-mass up to 2.4" in said(2.4)
    assert "judge: sample" in said(2.4)
    assert "look at the rewards of the held-out groups" in said(0.0)
