"""What a run prints while it trains."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.training import config_of, scored_dataset, trainer_of
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from gvpo_offline.errors import ConfigError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.record import progress
from gvpo_offline.train.record.progress import ProgressLines, duration


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


class Clock:
    """time.monotonic() that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


TRAINING: dict[str, Any] = {
    "loss": 0.41234,
    "explained_variance": 0.2,
    "pair_accuracy": 0.75,
    "best_log_ratio_mean": 0.8,
    "tokens_per_second": 1239.7,
    "learning_rate": 1e-3,
    "epoch": 0.3,
}
HELD_OUT: dict[str, Any] = {
    "eval_loss": 0.5,
    "eval_explained_variance": 0.3211,
    "eval_pair_accuracy": 0.7,
    "eval_best_log_ratio_mean": -0.25,
    "eval_log_ratio/x_explained_variance": 9.0,  # of a sampler
}


def state_at(step: int, steps: int = 400, *, main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=steps, is_world_process_zero=main)


def printed(
    lines: ProgressLines, capsys: pytest.CaptureFixture[str], *logged: tuple[int, dict[str, Any]]
) -> list[str]:
    for step, logs in logged:
        lines.on_log(None, state_at(step), TrainerControl(), logs=logs)  # type: ignore[arg-type]
    return capsys.readouterr().out.splitlines()


def begun(args: Any, at: int = 0, **options: Any) -> ProgressLines:
    lines = ProgressLines(**options)
    lines.on_train_begin(args, state_at(at), TrainerControl())
    return lines


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return config_of(tmp_path_factory.mktemp("args"), disable_tqdm=False)


def test_a_line_of_training(args: Any, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """120 of 400 steps in 103 s: the other 280 take 103 / 120 * 280 = 240.3 s. Before the first
    evaluation the fit is that of the training groups.
    """
    lines = begun(args)
    clock.now += 103
    assert printed(lines, capsys, (120, TRAINING), (120, HELD_OUT), (120, TRAINING)) == [
        (
            "step 120/400 (30%) · loss 0.412 · explained variance 0.2 · log-ratio of bests +0.8 · "
            "1,240 tok/s · 4 min left"
        ),
        "step 120/400 · held out · loss 0.5 · explained variance 0.321 · log-ratio of bests -0.25",
        (
            "step 120/400 (30%) · loss 0.412 · held-out explained variance 0.321 · "
            "log-ratio of bests +0.8 · 1,240 tok/s · 4 min left"
        ),
    ]


def test_a_resumed_run_reckons_from_its_own_steps_and_knows_the_last_evaluation(
    args: Any, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 steps in 10 s since step 100: 280 more take 140 s."""
    state = state_at(100)
    state.log_history = [{**HELD_OUT, "step": 100}, {**TRAINING, "step": 100}]
    lines = ProgressLines()
    lines.on_train_begin(args, state, TrainerControl())
    clock.now += 10
    (line,) = printed(lines, capsys, (120, TRAINING))
    assert "held-out explained variance 0.321" in line
    assert line.endswith("2 min left")


def test_another_loss_several_datasets_and_sampled_answers(
    args: Any, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where explained variance has no optimum of 1, the fit is the order of pairs; of two datasets
    it is the mean.
    """
    two = {
        **{f"eval_{n.removeprefix('eval_')}": v for n, v in HELD_OUT.items() if "/" in n},
        **{n.replace("eval_", "eval_a_"): v for n, v in HELD_OUT.items() if "/" not in n},
        **{n.replace("eval_", "eval_b_"): v / 2 for n, v in HELD_OUT.items() if "/" not in n},
        "eval_sampled_reward": 0.614,
        "eval_sampled_reward_se": 0.0312,
    }
    clock.now += 1
    assert printed(begun(args, regression=False), capsys, (400, two), (400, TRAINING)) == [
        (
            "step 400/400 · held out (a) · loss 0.5 · pairs in order 0.7 · log-ratio of bests "
            "-0.25 · sampled reward 0.614 ± 0.031"
        ),
        "step 400/400 · held out (b) · loss 0.25 · pairs in order 0.35 · log-ratio of bests -0.12",
        (
            "step 400/400 (100%) · loss 0.412 · held-out pairs in order 0.525 · "
            "log-ratio of bests +0.8 · 1,240 tok/s"
        ),
    ]


def test_other_lines(args: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The end of a run; what a user logs; and what only seven metrics need."""
    seven = {f"m{n}": n for n in range(7)}
    assert printed(
        *(begun(args), capsys),
        (400, {"train_runtime": 750.0, "train_loss": 0.5}),
        (7, {"mine": 1.23456, "epoch": 1.0}),
        (8, seven),
    ) == [
        "step 400/400 done in 12 min",
        "step 7/400 · mine 1.23",
        "step 8/400 · m0 0 · m1 1 · m2 2 · m3 3 · m4 4 · m5 5 · 1 more",
    ]


def test_only_the_main_process_prints(args: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("short", "json"):
        lines = ProgressLines(form)
        other = state_at(1, main=False)
        lines.on_train_begin(args, other, TrainerControl())
        lines.on_step_end(args, other, TrainerControl())
        lines.on_log(args, other, TrainerControl(), logs=TRAINING)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (59.0, "59 s"),
        (61.0, "1 min"),
        (3540.0, "59 min"),
        (7800.0, "2 h 10 min"),
        (97200.0, "1 d 3 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_texts_of_data_do_not_control_the_terminal(
    args: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset's name holds an escape sequence. A terminal without the dot gets a bar."""
    name = "a\x1b[2J"
    logs = {n.replace("eval_", f"eval_{name}_"): v for n, v in HELD_OUT.items() if "/" not in n}
    (line,) = printed(begun(args), capsys, (1, logs))
    assert line.startswith("step 1/400 · held out (a\\x1b[2J) · loss 0.5")
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", ascii_only)
    ProgressLines().on_log(args, state_at(1), TrainerControl(), logs=logs)
    text = ascii_only.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert text.startswith("step 1/400 | held out (a\\x1b[2J) | loss 0.5")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_moves_below_the_lines_of_a_terminal(
    args: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar is on standard error, and is gone at the end; a resumed run's starts at its step."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    lines = begun(args, at=1)
    for step in (2, 3):
        lines.on_step_end(args, state_at(step), TrainerControl())
    lines._bar.refresh()
    lines.on_log(args, state_at(3), TrainerControl(), logs=TRAINING)
    lines.on_train_end(args, state_at(3), TrainerControl())
    assert "1/400" in terminal.getvalue()
    assert "3/400" in terminal.getvalue()
    assert capsys.readouterr().out.startswith("step 3/400 (1%) · loss 0.412")


# ---- runs ----


def run_lines(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(("step ", "{"))]


def test_a_run_without_a_terminal_prints_plain_lines(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """disable_tqdm is not set. No line is drawn over."""
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, max_steps=2, disable_tqdm=False)
    capfd.readouterr()
    trainer.train()
    out, err = capfd.readouterr()
    assert "\r" not in out + err
    first, second, last = run_lines(out)
    assert first.startswith("step 1/2 (50%) · loss ")
    assert second.startswith("step 2/2 (100%) · loss ")
    assert last.startswith("step 2/2 done in ")


def test_json_lines_are_those_of_the_file(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, max_steps=2, log_format="json")
    capfd.readouterr()
    trainer.train()
    shown = run_lines(capfd.readouterr().out)
    assert shown == (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in shown] == [1, 2, 2]


def test_full_is_what_transformers_prints(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, max_steps=1, log_format="full")
    kinds = [type(own) for own in trainer.callback_handler.callbacks]
    assert PrinterCallback in kinds
    assert ProgressLines not in kinds
    capfd.readouterr()
    trainer.train()
    first = run_lines(capfd.readouterr().out)[0]
    assert "'reweighted_reward_mean'" in first


def test_full_has_a_bar_on_a_terminal_only(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file, each state of a bar would be a line, or a part of one long line."""
    for terminal, expected in ((False, PrinterCallback), (True, ProgressCallback)):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        changes = {"log_format": "full", "disable_tqdm": False}
        trainer = trainer_of(tiny_model_dir, dataset, tmp_path, max_steps=1, **changes)
        found = [type(own) for own in trainer.callback_handler.callbacks]
        printing = (PrinterCallback, ProgressCallback)
        assert [kind for kind in found if kind in printing] == [expected]


def test_callbacks_of_the_user_stay(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Of two printers the one of transformers is replaced, whatever their order."""
    for mine in (PrinterCallback(), ProgressCallback()):
        trainer = trainer_of(tiny_model_dir, dataset, tmp_path, max_steps=1, callbacks=[mine])
        found = trainer.callback_handler.callbacks
        assert any(own is mine for own in found)
        assert sum(type(own) in (PrinterCallback, ProgressCallback) for own in found) == 1
        assert sum(isinstance(own, ProgressLines) for own in found) == 1


def test_another_log_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="log_format is short, full or json; received long"):
        config_of(tmp_path, log_format="long")
