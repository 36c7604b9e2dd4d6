"""The command that each command names as the next one: the command line accepts it as it stands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.importing import write_jsonl
from support.sampling import local, prompt_rows

from gvpo_offline import cli
from gvpo_offline.cli import main
from gvpo_offline.commands.next_step import ARGUMENTS, after_data, after_tuning
from gvpo_offline.commands.report import kind_of
from gvpo_offline.commands.table import COMMANDS
from gvpo_offline.hub.pull import PullResult
from gvpo_offline.hub.push import PushResult
from gvpo_offline.store.manifest import Manifest
from gvpo_offline.tune.settings import TuneSettings

MAKES = ("import", "sample", "reward", "reference", "train")
LOOK = "to look at it in a browser: "
CPU = ["--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"]


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """Run a command; the line that names the next one.

    A command that makes a dataset or a run also names `report` with its folder.
    """
    capsys.readouterr()
    given = [str(word) for word in argv]
    status = main(given)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    if given[0] in MAKES:
        (look,) = (line for line in captured.out.split("\n") if line.startswith(LOOK))
        program, command, folder = shlex.split(look.removeprefix(LOOK))
        assert (program, command) == ("gvpo-offline", "report")
        assert kind_of([folder]) == ("runs" if given[0] == "train" else "dataset")
    (line,) = (line for line in captured.out.split("\n") if line.startswith("next: "))
    return line


def words_of(line: str, **capitals: Any) -> list[str]:
    """The words of the command in a line, as a shell reads them, after a check that they parse.

    Args:
        line: as printed.
        capitals: what the words in capitals stand for.
    """
    program, *words = shlex.split(line.removeprefix("next: "))
    assert program == "gvpo-offline"
    words = [str(capitals.get(word, word)) for word in words]
    assert not [word for word in words if "…" in word]
    assert not {"MODEL", "RUN", "FOLDER", "DATASET", "REWARD.yaml"} & set(words)
    cli._parse(words[0], COMMANDS[words[0]], words[1:])
    return words


def setting(words: list[str], name: str) -> str | None:
    return words[words.index(f"--{name}") + 1] if f"--{name}" in words else None


@pytest.fixture
def log(tmp_path: Path) -> Path:
    rows = [
        {"question": f"What is {i} + 3?", "answer": text, "score": reward}
        for i in range(12)
        for text, reward in ((str(i + 3), 1.0), ("no", 0.0), (f"{i}", 0.5))
    ]
    return write_jsonl(tmp_path / "log.jsonl", rows)


def test_from_a_log_to_an_evaluation_by_the_printed_commands(
    log: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a folder whose name a shell would cut in pieces. The settings of the reference go on to
    the run, and `evaluate` finds what the run held out.
    """
    root = tmp_path / "it's $HOME; a folder"
    data, out = root / "data", root / "run"
    columns = ["--columns.prompt", "question", "--columns.response", "answer"]
    line = run(
        *(capsys, "import", "--inputs", log, "--output_dir", data, *columns),
        *("--columns.reward", "score", "--tokenizer_name_or_path", tiny_model_dir),
        *("--show_progress", "false"),
    )
    words = words_of(line)
    assert words[:3] == ["reference", "--dataset", str(data)]
    more = ["--use_cpu", "true", "--bf16", "true", "--where", "group_size >= 2"]
    words = words_of(run(capsys, *words, *more), RUN=out)
    assert words[0] == "train"
    assert setting(words, "model_name_or_path") == str(tiny_model_dir)
    assert (setting(words, "bf16"), setting(words, "where")) == ("true", "group_size >= 2")
    assert setting(words, "reward") is None
    own = ["--max_steps", "2", "--groups_per_step", "4", "--eval_fraction", "0.4"]
    line = run(capsys, *words, *own, "--disable_tqdm", "true", "--report_to", "none")
    words = words_of(line)
    compute = ["--bf16", "true", "--use_cpu", "true"]
    assert words == ["evaluate", "--model_name_or_path", str(out), *compute]
    assert main([*words, "--show_progress", "false"]) == 0
    held_out = json.loads((out / "gvpo_run.json").read_text())["order"]["datasets"][0]
    n_held_out = 12 - held_out["n_groups"]
    assert n_held_out > 0
    said = f"{n_held_out} groups of {data} (held out: eval_fraction 0.4, by prompt)"
    assert capsys.readouterr().out.startswith(said)
    assert f"held out: {n_held_out} groups of {data} (eval_fraction, by prompt)" in caplog.messages


def test_a_reward_before_the_reference_names_the_reference(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sample`, then `reward`, then `reference`, then `train`; a second reward must be named."""
    data = tmp_path / "data"
    prompts = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(4))
    (tmp_path / "sample.yaml").write_text(
        json.dumps(
            {
                "inputs": str(prompts),
                "tokenizer_name_or_path": str(tiny_model_dir),
                "samplers": {"own": local(tiny_model_dir)},
                "output_dir": str(data),
            }
        )
    )
    line = run(capsys, "sample", "--config", tmp_path / "sample.yaml", "--show_progress", "false")
    (tmp_path / "reward.yaml").write_text(
        "scorers: {right: {kind: exact, column: answer}}\nshow_progress: false\n"
    )
    words = words_of(line, **{"REWARD.yaml": tmp_path / "reward.yaml"})
    assert words[0] == "reward"
    words = words_of(run(capsys, *words))
    assert words[0] == "reference"
    given = [*words[:3], "--model_name_or_path", tiny_model_dir, "--use_cpu", "true"]
    words = words_of(run(capsys, *given), RUN=tmp_path / "run")
    assert (words[0], setting(words, "reward")) == ("train", None)
    (tmp_path / "second.yaml").write_text(
        "name: second\nscorers: {right: {kind: exact, column: answer, ignore_case: true}}\n"
    )
    argv = ["reward", "--dataset", data, "--config", tmp_path / "second.yaml"]
    words = words_of(run(capsys, *argv), RUN=tmp_path / "run")
    assert (words[0], setting(words, "reward")) == ("train", "second")
    assert setting(words, "model_name_or_path") == str(tiny_model_dir)


def test_a_run_without_held_out_groups_asks_for_a_dataset(
    log: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise `evaluate` would measure the training groups."""
    data = tmp_path / "data"
    columns = ["--columns.prompt", "question", "--columns.response", "answer"]
    argv = ["import", "--inputs", log, "--output_dir", data, *columns, "--columns.reward", "score"]
    run(capsys, *argv, "--tokenizer_name_or_path", tiny_model_dir, "--show_progress", "false")
    run(capsys, "reference", "--dataset", data, "--model_name_or_path", tiny_model_dir, *CPU[:2])
    argv = ["train", "--model_name_or_path", tiny_model_dir, "--dataset", data, *CPU]
    line = run(capsys, *argv, "--max_steps", "1", "--output_dir", tmp_path / "run")
    assert setting(shlex.split(line), "dataset") == "DATASET"
    words_of(line, DATASET=data)


def test_tune_names_train_with_its_own_arguments(tmp_path: Path) -> None:
    """Without those that only `tune` has, in every form in which they can be given."""
    own, proposed = tmp_path / "my train.yaml", tmp_path / "tune" / "proposed.yaml"
    own.write_text(json.dumps({"model_name_or_path": "model", "dataset": "data"}))
    proposed.parent.mkdir()
    proposed.write_text("beta: 0.2\nlearning_rate: 1e-05\n")
    given = ["--config", str(own), "--tune-steps", "50", "--betas=[0.1, 0.2]", "--use_cpu"]
    given += ["--judge_samples", "[8, 64]", "--eval_fraction", "0.2", "--betas+", "0.4"]
    token = ARGUMENTS.set(tuple(given))
    try:
        words = words_of(after_tuning(proposed, TuneSettings))
        assert words == [
            *("train", "--config", str(own), "--use_cpu", "--eval_fraction", "0.2"),
            *("--config", str(proposed)),
        ]
        own.write_text(json.dumps({"model_name_or_path": "m", "dataset": "d", "tune_steps": 30}))
        line = after_tuning(proposed, TuneSettings)
        assert line.startswith("next: move tune_steps out of the file of settings, then gvpo-")
    finally:
        ARGUMENTS.reset(token)


def test_push_and_pull(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was pushed to a branch is pulled from it. The hub itself is not asked here."""
    pushed = PushResult("https://hub", 1, 0, 0, 0)
    monkeypatch.setattr("gvpo_offline.hub.push.push", lambda config: pushed)
    argv = ["push", "--dataset", tmp_path, "--repo_id", "me/data", "--revision", "trial"]
    words = words_of(run(capsys, *argv), FOLDER=tmp_path / "a folder")
    assert (words[0], setting(words, "revision")) == ("pull", "trial")
    pulled = PullResult(Manifest(groups=[]), "abc", 0, 0)
    monkeypatch.setattr("gvpo_offline.hub.pull.pull", lambda config: pulled)
    folder = tmp_path / "it's here"
    words = words_of(run(capsys, "pull", "--repo_id", "me/data", "--output_dir", folder))
    assert words == ["ls", str(folder)]


def test_a_dataset_of_incomplete_groups_is_merged() -> None:
    words = words_of(after_data("single", Manifest(groups=[]), {}), DATASET="other")
    assert words == ["merge", "--dataset", "other", "--add", "single"]
