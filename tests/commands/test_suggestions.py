"""What the command line says about a flag or a YAML key that a command does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from gvpo_offline import cli
from gvpo_offline.commands.table import COMMANDS
from gvpo_offline.importing.settings import Columns
from gvpo_offline.train.foreign import CONFIG_NAMES, EQUIVALENTS, SAMPLER_NAMES, VERL_PATHS


def line_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that stops with status 1."""
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith(f"gvpo-offline {argv[0]}: error: ")
    return line


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        # Misspelled, and written with hyphens.
        (
            ["train", "--learning_rte", "1"],
            "received --learning_rte. Did you mean --learning_rate?",
        ),
        # A flag with dashes is the setting: only what else is required is missing.
        (["train", "--learning-rate=1"], "received no model_name_or_path."),
        (["train", "--learning-rte=1"], "Did you mean --learning_rate?"),
        (["import", "--columns.promt", "x"], "Did you mean --columns.prompt?"),
        (["train", "--responses.sampler", "x"], "Did you mean --responses.samplers?"),
        (["ls", "data", "--vrsion", "3"], "Did you mean --dataset_version?"),
        # Names of TRL, verl and others, where a setting has the same meaning.
        (["train", "--model", "m"], "Here it is --model_name_or_path."),
        (["train", "--lr", "1"], "Here it is --learning_rate."),
        (["train", "--dataset_name", "d"], "Here it is --dataset."),
        (["import", "--dataset", "d"], "Here it is --inputs."),
        (["train", "data.train_files=x"], "Here it is --dataset."),
        (["train", "actor_rollout_ref.model.path=x"], "Here it is --model_name_or_path."),
        (["train", "--actor_rollout_ref.actor.optim.lr=1"], "Here it is --learning_rate."),
        (
            ["sample", "--num_generations", "4"],
            "it is a setting of a sampler: samplers.NAME.responses.",
        ),
        (
            ["sample", "--actor_rollout_ref.rollout.n=4"],
            "it is a setting of a sampler: samplers.NAME.responses.",
        ),
        (["import", "--max_prompt_length", "3"], "Here it is --max_length."),
        # Names of TRL for something that is done elsewhere.
        (["train", "--max_prompt_length", "3"], "No response is cut in training"),
        (["train", "--num_generations", "3"], "Responses are sampled before training"),
        (["train", "--ref_model", "m"], "`gvpo-offline reference` computes them once"),
        (["train", "--compute_metrics", "m"], "evaluate and predict compute the metrics"),
        # A setting of another command.
        (["import", "--inputs", "a.jsonl", "b.jsonl"], "a list is one value, '[a, b]', and"),
        (
            ["import", "--beta", "1"],
            "It is a setting of gvpo-offline report, tune, train, evaluate.",
        ),
        (["import", "--columns.messages", "x"], "Here it is --columns.prompt."),
        # The last part of the key is a setting of the command.
        (["reward", "--reward.name", "correct"], "received --reward.name. Did you mean --name?"),
        # Nothing is similar.
        (["reward", "--xyzzy", "1"], "received --xyzzy. See gvpo-offline reward --help."),
        (["validate", "--dataset.a", "1"], "a setting within dataset, which is a single value"),
    ],
)
def test_a_wrong_flag_is_answered(
    argv: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = line_of(argv, capsys)
    assert answer.lower() in line.lower()
    assert line.endswith(f"See gvpo-offline {argv[0]} --help.")


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["train", "--beta", "abc"], "received beta: abc. Set beta to a number. See"),
        (
            ["train", "--imitation", "much"],
            "received imitation: much. Set imitation to a number or one of 'auto'. See",
        ),
        (
            ["train", "--held_out_by", "row"],
            "received held_out_by: row. Set held_out_by to one of 'auto', 'prompt', 'group'. See",
        ),
        (["import", "--max_errors", "x"], "Set max_errors to an integer. See"),
        (["sample", "--samplers", "[1]"], "Set samplers to a mapping of names to values. See"),
        (["train", "--beta", "0.1"], "received no model_name_or_path. See"),
    ],
)
def test_a_value_of_the_wrong_type_is_answered_with_the_right_type(
    argv: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = line_of(argv, capsys)
    assert f"{answer} gvpo-offline {argv[0]} --help." in line


def test_a_batch_setting_of_trl_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is a flag, because it is a field of TrainingArguments; the configuration refuses it."""
    argv = ["train", "--model_name_or_path", "m", "--dataset", str(tmp_path)]
    line = line_of([*argv, "--per_device_train_batch_size", "4"], capsys)
    assert "Set groups_per_step and max_tokens_per_micro_batch." in line


@pytest.mark.parametrize(
    ("command", "text", "answer"),
    [
        ("train", "learning_rte: 1\n", "the key learning_rte. Did you mean learning_rate?"),
        ("train", "lr: 1\n", "the key lr. Here it is learning_rate."),
        ("import", "columns: {promt: x}\n", "the key columns.promt. Did you mean columns.prompt?"),
        ("train", "datasets: [{pth: x}]\n", "the key pth. Did you mean path?"),
        (
            "sample",
            "num_generations: 4\n",
            "It is a setting of a sampler: samplers.NAME.responses.",
        ),
        (
            "reference",
            "beta: 4\n",
            "It is a setting of gvpo-offline report, tune, train, evaluate.",
        ),
    ],
)
def test_a_wrong_key_is_answered(
    tmp_path: Path, command: str, text: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    assert answer in line_of([command, "--config", str(tmp_path / "settings.yaml")], capsys)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("train", "tune")])
def test_every_command_answers_in_one_line(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags and files that are wrong in ways that have nothing to do with the command."""
    files = {
        "latin.yaml": "dataset: café\n".encode("latin-1"),
        "binary.yaml": b"\x00\xff\xfe",
        "list.yaml": b"- 1\n",
        "scalar.yaml": b"hello\n",
        "tab.yaml": b"a:\n\t- 1\n",
        "alias.yaml": b"a: *x\n",
        "tag.yaml": b"a: !!python/object:os.system x\n",
        "number.yaml": b"1: 2\n",
        "mapping.yaml": b"{a: 1}: 1\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        line_of([command, "--config", str(tmp_path / name)], capsys)
    for argv in (["--config", str(tmp_path)], ["--config"], ["--=x"], ["-x"], ["--xyzzy.a.b=1"]):
        line_of([command, *argv], capsys)


def test_null_for_the_responses_of_a_dataset_takes_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("model_name_or_path: m\ndatasets: [{path: nowhere, responses: null}]\n")
    line = line_of(["train", "--config", str(path), "--use_cpu", "true"], capsys)
    assert "nowhere: a dataset is a folder that holds a manifest" in line


def test_an_unknown_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "no command 'trian': did you mean train?" in capsys.readouterr().err


def test_abbreviations_and_keys_of_dictionaries_are_left_to_the_parser() -> None:
    argv = ["--inputs", "a", "--output_d", "o", "--tokenizer_name_or_path", "t"]
    values = cli._parse("sample", COMMANDS["sample"], [*argv, "--samplers.a", "{kind: vllm}"])
    assert values["samplers"] == {"a": {"kind": "vllm"}}
    assert values["output_dir"] == "o"


def test_every_answer_refers_to_settings_that_exist() -> None:
    """Each target of the table is a setting of some command."""
    from gvpo_offline.train.config import GVPOConfig

    kinds = [kind for command in COMMANDS.values() for kind in command.settings]
    known = {name for kind in (*kinds, GVPOConfig) for name in kind.__dataclass_fields__}
    known |= {f"columns.{name}" for name in Columns.__dataclass_fields__}
    assert {target for targets in EQUIVALENTS.values() for target in targets} <= known
    assert set(VERL_PATHS.values()) <= {*EQUIVALENTS, *CONFIG_NAMES, *SAMPLER_NAMES}
