"""No secret of the settings is written: to files, cards, logs, checkpoints, or the terminal."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fork_server import ForkServer
from support.remote_servers import FolderServer, serving
from support.training import config_of, scored_dataset, train_command, trainer_of

from gvpo_offline.secret_settings import is_secret, public, without_credentials
from gvpo_offline.store.dataset import GroupDataset

MARK = "s3cr3t"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 8)


def leaks(folder: Path) -> list[str]:
    """Files that hold the mark, also in the members of PyTorch's zip files, which are stored."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found
    return [str(path.relative_to(folder)) for path in found if MARK.encode() in path.read_bytes()]


def test_a_run_writes_no_secret(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """The token of the hub, a header of the dataset's requests, and keys in the environment. The
    command succeeds, is refused, and fails; a URL with a password is refused. The output is read
    too.
    """
    work = tmp_path / "work"
    work.mkdir()
    with serving(FolderServer(dataset.root)) as files:
        address = files.url.rstrip("/")
        flags = {
            "hub_token": f"hf_{MARK}_b",
            "remote.storage_options": json.dumps({"headers": {"X-Key": f"{MARK}-c"}}),
            "remote.cache_dir": work / "cache",
            "remote.attempts": 2,
            "report_to": "tensorboard",
            "max_steps": 2,
            "save_steps": 1,
            "eval_strategy": "no",
            "eval_fraction": 0.3,
        }
        env = {"WANDB_API_KEY": f"{MARK}-d", "HF_TOKEN": f"hf_{MARK}_e"}
        command = train_command(dataset, tiny_model_dir, work / "run", **flags)
        at = command.index("--eval_dataset")
        del command[at : at + 2]
        command[command.index("--dataset") + 1] = address
        status, output = server.run(command, env=env)
        assert status == 0, output
        assert files.reads
        (work / "output.txt").write_text(output)
        status, again = server.run(command, env=env)
        assert (status, "a new run's output_dir is empty" in again) == (1, True)
        (work / "again.txt").write_text(again)
        with_password = command.copy()
        with_password[command.index(address)] = address.replace("://", f"://user:{MARK}-a@")
        status, refused = server.run(with_password, env=env)
        assert (status, "URL holds no credentials" in refused) == (1, True)
        (work / "refused.txt").write_text(refused)
    command += ["--resume_from_checkpoint", "true"]
    status, output = server.run(command, env=env)  # no server: the error names the URL
    assert status == 1
    (work / "unreachable.txt").write_text(output)
    assert leaks(work) == []
    saved = list(work.rglob("training_args.bin"))
    assert len(saved) == 3  # two checkpoints and the policy
    assert all(torch.load(own, weights_only=False).hub_token is None for own in saved)


def test_the_token_stays_with_the_trainer(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """It is needed to push the policy after training."""
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, hub_token=f"hf_{MARK}", max_steps=1)
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == f"hf_{MARK}"
    assert leaks(tmp_path) == []


def test_the_commands_that_go_on_hide_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from gvpo_offline.commands.next_step import ARGUMENTS, after_tuning, going_on
    from gvpo_offline.tune.settings import TuneSettings

    words = ("--dataset", f"s3://u:{MARK}@b/d", "--hub_token", f"hf_{MARK}", f"--hub-token={MARK}")
    token = ARGUMENTS.set((*words, "--resume_from_checkpoint", "true", "--beta", "0.1"))
    try:
        said = [going_on("train"), after_tuning(Path("p.yaml"), TuneSettings)]
    finally:
        ARGUMENTS.reset(token)
    assert MARK not in str(said)
    assert said[0].endswith("--beta 0.1 --resume_from_checkpoint auto")


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("hub_token", True),
        ("remote.storage_options", True),
        ("api_key", True),
        ("aws_secret_access_key", True),
        ("password", True),
        ("api_key_env", False),
        ("max_tokens_per_micro_batch", False),
        ("prompt_token_ids", False),
        ("tokenizer_name_or_path", False),
    ],
)
def test_which_settings_are_secret(name: str, secret: bool) -> None:
    assert is_secret(name) is secret


def test_urls_keep_all_but_their_credentials() -> None:
    url = f"https://me:{MARK}@host:80/a/b?x=1&X-Amz-Signature={MARK}&token={MARK}#part"
    assert without_credentials(url) == "https://…@host:80/a/b?x=1&X-Amz-Signature=…&token=…#part"
    assert without_credentials("a@b and s3://bucket/x?y=2") == "a@b and s3://bucket/x?y=2"
    given: dict[str, Any] = {"a": [{"api_key": MARK, "n": 3}], "headers": {"h": MARK}, "t": (url,)}
    assert MARK not in json.dumps(public(given))
    assert public(given)["a"][0]["n"] == 3


def test_programs_that_record_arguments_see_no_secret(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B writes `sys.argv` to a file of the run."""
    from gvpo_offline.commands.next_step import hide_arguments

    monkeypatch.setattr(sys, "argv", ["gvpo-offline", "train", "--hub_token", MARK, "--beta", "1"])
    hide_arguments()
    assert sys.argv == ["gvpo-offline", "train", "--hub_token", "…", "--beta", "1"]
    assert os.environ.get("HF_TOKEN") != MARK
    assert config_of(tmp_path, hub_token=MARK).hub_token == MARK
