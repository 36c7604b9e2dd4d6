"""The command line: help, settings from YAML and flags, one-line errors, and the whole workflow
from a log to an evaluated policy.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from support.builders import training_table
from support.fork_server import ForkServer
from support.training import score, unscored_dataset

from gvpo_offline import cli
from gvpo_offline.commands.command import filled
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.settings import (
    CommonTrainingSettings,
    GVPOSettings,
    LoraSettings,
    RunSettings,
)
from gvpo_offline.version import __version__

COMMANDS = (
    "import",
    "sample",
    "reward",
    "reference",
    "merge",
    "compact",
    "retokenise",
    "validate",
    "ls",
    "order",
    "show",
    "doctor",
    "report",
    "plan",
    "push",
    "pull",
    "tune",
    "train",
    "evaluate",
)


# ---- help ----

HELP_OF_ALL = """
import contextlib, io, json, sys
from gvpo_offline import cli
texts = {}
for argv in ([], ["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = cli.main(argv)
        except SystemExit as end:
            code = end.code
    texts[" ".join(argv)] = [code, out.getvalue()]
print(json.dumps([texts, sorted({"torch", "transformers", "pyarrow"} & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def helps() -> tuple[dict[str, tuple[int, str]], list[str]]:
    """Exit status and text of every `--help`, and the slow modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True, check=True
    )
    texts, loaded = json.loads(done.stdout)
    return texts, loaded


def test_help_imports_no_slow_modules(helps: tuple[dict[str, tuple[int, str]], list[str]]) -> None:
    assert helps[1] == []


def test_every_setting_has_a_help_text(
    helps: tuple[dict[str, tuple[int, str]], list[str]],
) -> None:
    """Each setting is listed with a description, and there is an example."""
    texts = helps[0]
    assert set(cli.COMMANDS) == set(COMMANDS)
    for name in COMMANDS:
        status, text = texts[f"{name} --help"]
        assert status == 0
        assert f"gvpo-offline {name} --" in text.split("options:")[1]  # the example
        assert "--config" in text
        assert f"  {name}" in texts["--help"][1]
        for kind in cli.COMMANDS[name].settings:
            for field in fields(kind):
                if field.name in ("columns", "resume_from_checkpoint"):
                    continue
                described = rf"--{field.name} [^\n]*\n?\s+[A-Z][a-zA-Z ]+"
                assert re.search(described, text), (name, field.name)
    assert "--resume_from_checkpoint" in texts["train --help"][1]
    assert "--columns.reward" in texts["import --help"][1]
    assert texts[""][0] == 2  # a missing command is an error
    assert texts["--help"][0] == 0
    assert texts["--version"] == [0, __version__ + "\n"]


def test_the_installed_command_runs_this_module() -> None:
    script = Path(sys.executable).parent / "gvpo-offline"
    for argv in ([str(script)], [sys.executable, "-m", "gvpo_offline.cli"]):
        done = subprocess.run([*argv, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == __version__ + "\n"


# ---- settings ----


def parsed(name: str, *argv: object) -> dict[str, Any]:
    """The values of the settings with which a command would run."""
    return cli._parse(name, cli.COMMANDS[name], [str(word) for word in argv])


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(
        "model_name_or_path: model\ndataset: data\nbeta: 0.3\nlearning_rate: 1e-6\n"
        "eval_strategy: no\nreport_to: none\nlora_target_modules: [q_proj, v_proj]\n"
        "resume_from_checkpoint: auto\nlr_scheduler_kwargs: {num_cycles: 2}\nwarmup_steps: 0.1\n"
    )
    values = parsed("train", "--config", path, "--beta", 0.7, "--eval_steps", 5)
    assert values["beta"] == 0.7
    assert values["learning_rate"] == 1e-6  # text in YAML 1.1
    assert values["eval_strategy"] == "no"  # false in YAML 1.1
    assert values["eval_steps"] == 5
    assert values["lora_target_modules"] == ["q_proj", "v_proj"]
    assert values["resume_from_checkpoint"] == "auto"
    assert values["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert values["groups_per_step"] == GVPOSettings().groups_per_step
    assert parsed("train", "--beta", 0.7, "--config", path)["beta"] == 0.3  # the last one counts
    proposed = tmp_path / "proposed.yaml"
    proposed.write_text("beta: 0.25\n")
    both = parsed("train", "--config", path, "--config", proposed)
    assert (both["beta"], both["learning_rate"]) == (0.25, 1e-6)
    tuned = parsed("tune", "--config", path, "--betas", "[0.1, 0.2]")  # has all settings of train
    assert (tuned["betas"], tuned["resume_from_checkpoint"]) == ([0.1, 0.2], "auto")
    args = filled(GVPOConfig, {**values, "output_dir": str(tmp_path), "use_cpu": True})
    assert (args.beta, args.learning_rate, args.warmup_steps) == (0.7, 1e-6, 0.1)


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("false", False), ("auto", "auto"), ("out/checkpoint-3", "out/checkpoint-3")],
)
def test_what_to_resume_from(text: str, value: object) -> None:
    found = parsed("train", "--model_name_or_path", "m", "--resume_from_checkpoint", text)
    assert found["resume_from_checkpoint"] == value
    assert filled(RunSettings, found).resume_from_checkpoint == value


def test_settings_of_import_nest(tmp_path: Path) -> None:
    path = tmp_path / "import.yaml"
    path.write_text(
        "inputs: [a.jsonl, b.jsonl]\noutput_dir: data\ncolumns:\n  reward: score\n"
        "samplers:\n  hot: {temperature: 1.2}\n"
    )
    values = parsed("import", "--config", path, "--columns.prompt", "question")
    assert values["inputs"] == ["a.jsonl", "b.jsonl"]
    assert values["columns"]["reward"] == "score"
    assert values["columns"]["prompt"] == "question"
    assert values["columns"]["response"] == "response"
    assert values["samplers"] == {"hot": {"temperature": 1.2}}


def test_help_shows_the_defaults_of_the_run() -> None:
    """`train --help` shows a dataclass of this package; the run uses one based on transformers'."""
    shown, taken = CommonTrainingSettings(), GVPOConfig(use_cpu=True)
    for field in fields(CommonTrainingSettings):
        assert hasattr(taken, field.name), field.name
        mine, theirs = getattr(shown, field.name), getattr(taken, field.name)
        theirs = theirs.value if isinstance(theirs, Enum) else theirs
        if field.name == "use_cpu":
            continue
        if field.name == "report_to":
            assert (mine, theirs) == ("none", [])
        elif field.name == "activation_checkpointing":
            assert not mine
            assert not theirs
        else:
            assert mine == theirs, field.name
    # No two dataclasses of a command have a setting of the same name.
    names = [
        field.name
        for kind in (CommonTrainingSettings, GVPOSettings, LoraSettings)
        for field in fields(kind)
    ]
    assert len(names) == len(set(names))


# ---- errors ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["validate"], "received no dataset. See"),
        (["train"], "received no model_name_or_path. See"),
        (["train", "--model_name_or_path", "m"], "a run has either `dataset` or `datasets`"),
        (["reference", "--model_name_or_path", "m"], "dataset must be set"),
        (["evaluate", "--dataset", "d"], "model_name_or_path must be set"),
        (["import", "--inputs", "[a.jsonl]"], "received no output_dir. See"),
        (["import", "--inputs", "[]", "--output_dir", "o"], "import needs at least one input"),
        (
            ["validate", "--dataset", "d", "--datset", "e"],
            "--datset. Did you mean --dataset?",
        ),
        (["merge", "d"], "unrecognized arguments: d"),
        (["validate", "--dataset", "nowhere"], "nowhere: a dataset is a folder that holds"),
        (
            ["train", "--dataset", "nowhere", "--model_name_or_path", "no-model"],
            "nowhere: a dataset is a folder that holds",
        ),
        (["train", "--beta", "high"], "received beta: high"),
        (["reference", "--dtype", "int8"], "received dtype: int8"),
        (["train", "--groups_per_step", "1.5"], "received groups_per_step: 1.5"),
        (["validate", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_wrong_flag_gives_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"gvpo-offline {argv[0]}: error: ")
    assert message in line
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "dataset: d\nshow_progres: true\n",
            "the key show_progres. Did you mean show_progress?",
        ),
        ("dataset: d\nshow_progress: maybe\n", "show_progress: maybe"),
        ("dataset: [d\n", "while parsing a flow sequence"),
        ("dataset: d\ndataset: e\n", "the key 'dataset' occurs twice"),
    ],
)
def test_an_error_in_the_file_gives_one_line(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert cli.main(["validate", "--config", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.endswith("See gvpo-offline validate --help.")


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian", "--beta", "1"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_a_refused_setting_names_the_setting_to_use_instead(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--model_name_or_path", str(tiny_model_dir), "--dataset", str(tmp_path)]
    assert cli.main([*argv, "--per_device_train_batch_size", "4"]) == 1
    assert "Set groups_per_step and max_tokens_per_micro_batch." in capsys.readouterr().err
    assert cli.main([*argv, "--eval_strategy", "sometimes"]) == 1
    assert "please select one of ['no', 'steps', 'epoch']" in capsys.readouterr().err


# ---- the whole workflow ----


def write_log(path: Path) -> None:
    """20 prompts with 4 responses each from two samplers; short correct answers have the largest
    reward.
    """
    rows = [
        {
            "question": f"What is {a} + {b}?",
            "answer": answer,
            "score": score,
            "by": sampler,
        }
        for a in range(4)
        for b in range(5)
        for answer, score, sampler in (
            (f"{a + b}", 1.0, "good"),
            (f"The answer is {a + b}.", 0.8, "good"),
            (f"{a + b + 1}", 0.0, "bad"),
            ("Hello!", 0.0, "bad"),
        )
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_whole_workflow(tmp_path: Path, tiny_model_dir: Path, server: ForkServer) -> None:
    """import, reference, validate, train and evaluate, each from a YAML file and in its own
    process: from a log of text to a policy that explains held-out rewards better than the
    reference.
    """
    write_log(tmp_path / "log.jsonl")
    model, data, out = tiny_model_dir, tmp_path / "data", tmp_path / "run"

    def run(name: str, **settings: Any) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(settings, default=str))
        status, output = server.run([name, "--config", path])
        assert status == 0, output
        return output

    columns = {"prompt": "question", "response": "answer", "reward": "score", "sampler": "by"}
    run(
        "import",
        inputs=[str(tmp_path / "log.jsonl")],
        output_dir=data,
        tokenizer_name_or_path=model,
        columns=columns,
    )
    output = run("reference", dataset=data, model_name_or_path=model, use_cpu=True)
    assert "20 groups" in output
    output = run("validate", dataset=data)
    assert "valid." in output
    assert "20 groups, 80 responses" in output
    # Of these 20 prompts, the hashes of 7 are below 0.45.
    judge = {"dataset": data, "beta": 0.2, "eval_fraction": 0.45, "use_cpu": True}
    before = run("evaluate", model_name_or_path=model, output_file=tmp_path / "a.json", **judge)
    assert "good" in before
    run(
        "train",
        **judge,
        model_name_or_path=model,
        output_dir=out,
        groups_per_step=7,
        num_train_epochs=1,
        learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="no",
        disable_tqdm=True,
    )
    # The rest is read from the run: dataset, beta and held-out share.
    run("evaluate", model_name_or_path=out, output_file=tmp_path / "b.json", use_cpu=True)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert one["metrics"]["explained_variance"] == pytest.approx(0, abs=1e-4)
    assert two["metrics"]["explained_variance"] > 0.1
    assert two["n_groups"] == one["n_groups"] > 0
    assert two["samplers"]["good"]["log_ratio_mean"] > two["samplers"]["bad"]["log_ratio_mean"]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    held_out = [line["eval_explained_variance"] for line in history if "eval_loss" in line]
    assert held_out[-1] == pytest.approx(two["metrics"]["explained_variance"], abs=1e-5)
    check_saved_run(out, model, data)


def check_saved_run(out: Path, model: Path, data: Path) -> None:
    """The run's folder holds its settings and a complete policy."""
    saved = json.loads((out / "gvpo_run.json").read_text())
    assert saved["package_version"] == __version__
    assert saved["model"]["model_name_or_path"] == str(model)
    assert saved["data"]["dataset"] == str(data)
    assert saved["training"]["beta"] == 0.2
    assert saved["training"]["groups_per_step"] == 7
    assert saved["lora"]["use_peft"] is False
    assert set(saved["identity"]) == {"data", "model", "objective", "optimization"}
    assert (out / "tokenizer.json").is_file()
    assert load_file(out / "model.safetensors")


def test_an_adapter_trains_on_a_parquet_file(
    tmp_path: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    """A Parquet file of another program trains without conversion. Only the LoRA adapter is trained
    and saved, and it can be evaluated.
    """
    root = unscored_dataset(tmp_path / "data", tiny_model_dir, 8)
    dataset = score(root, tiny_model_dir)
    groups = [g for i in range(dataset.n_row_groups) for g in dataset.groups(i)]
    pq.write_table(training_table(groups), tmp_path / "groups.parquet")
    flags = {
        "model_name_or_path": tiny_model_dir,
        "dataset": tmp_path / "groups.parquet",
        "output_dir": tmp_path / "run",
        "use_peft": "true",
        "lora_target_modules": "all-linear",
        "lora_r": 2,
        "max_steps": 2,
        "use_cpu": "true",
    }
    argv = ["train", *(word for name, value in flags.items() for word in (f"--{name}", value))]
    status, output = server.run(argv)
    assert status == 0, output
    assert "the dataset records no tokenizer" in output  # no tokenizer to compare with
    assert re.search(r"this run: \S+ GB of \S+, \S+ operations a step", output)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    judge = {**flags, "model_name_or_path": tmp_path / "run", "output_file": tmp_path / "fit.json"}
    names = ("model_name_or_path", "dataset", "output_file", "use_cpu")
    status, output = server.run(["evaluate", *(w for n in names for w in (f"--{n}", judge[n]))])
    assert status == 0, output
    assert json.loads((tmp_path / "fit.json").read_text())["n_groups"] == 8
