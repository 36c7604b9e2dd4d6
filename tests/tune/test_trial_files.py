"""Damage to the files that a search keeps: found, and named, before anything follows from them."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gvpo_offline.errors import IntegrityError
from gvpo_offline.report.run.tune import read_tune
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.tune.answers import answers_name, read_answers, read_diverged
from gvpo_offline.tune.policy_files import read_parameters, write_parameters
from gvpo_offline.tune.trial_files import trial_text
from gvpo_offline.tune.trials import Trials, searches

FIGURES = {"explained_variance": 0.25, "loss": 1.5, "likely_log_mass_mean": math.nan}
FIGURES |= {"likely_reweighted_reward_mean": 0.5, "likely_reward_mean": 0.25}
IDENTITY = {"settings": "a" * 64}


class _Trainer:
    """In the place of a trainer whose trial gives `FIGURES`; counts its runs."""

    runs = 0

    def train_and_evaluate(self) -> dict[str, float]:
        _Trainer.runs += 1
        return FIGURES


def trials_in(folder: Path) -> Trials:
    args = GVPOConfig(output_dir=str(folder), use_cpu=True, report_to="none", beta=1.0)
    return Trials(lambda *_: _Trainer(), args, 100, folder, IDENTITY)


def kept(folder: Path) -> Path:
    (path,) = (folder / "trials").iterdir()
    return path


def flipped(content: bytes, drawn: random.Random) -> bytes:
    at = drawn.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << drawn.randrange(8)]) + content[at + 1 :]


def test_every_random_change_of_a_trial_is_found(tmp_path: Path) -> None:
    """Flipped bits and cut ends. Then the file is removed, as the error says, and the trial
    repeated.
    """
    _Trainer.runs = 0
    seed = random.randrange(2**32)
    drawn = random.Random(seed)
    trials = trials_in(tmp_path)
    found = trials.trial(1.0, 1e-3, 10)
    assert trials.trial(1.0, 1e-3, 10).keys() == found.keys()
    assert _Trainer.runs == 1
    path = kept(tmp_path)
    whole = path.read_bytes()
    assert json.loads(whole)["figures"]["explained_variance"] == 0.25
    for number in range(60):
        changed = flipped(whole, drawn) if number % 3 else whole[: drawn.randrange(len(whole))]
        path.write_bytes(changed)
        with pytest.raises(IntegrityError, match="Remove the file; the trial is then") as error:
            trials_in(tmp_path).trial(1.0, 1e-3, 10)
        assert error.value.file == str(path), f"seed {seed}"
    assert searches(tmp_path) == set()
    path.unlink()
    trials_in(tmp_path).trial(1.0, 1e-3, 10)
    assert _Trainer.runs == 2
    assert searches(tmp_path) == {"a" * 64}


@pytest.mark.parametrize("hashed", [True, False])
def test_the_file_of_another_trial_is_found(tmp_path: Path, hashed: bool) -> None:
    """It is whole, but of another learning rate; also if an earlier version wrote it."""
    trials = trials_in(tmp_path)
    trials.trial(1.0, 1e-3, 10)
    first = kept(tmp_path)
    trials.trial(1.0, 1e-2, 10)
    (other,) = {*(tmp_path / "trials").iterdir()} - {first}
    if not hashed:
        content = json.loads(other.read_text())
        del content["sha256"], content["file"]
        other.write_text(json.dumps(content))
        assert trials_in(tmp_path).trial(1.0, 1e-2, 10)["loss"] == 1.5
    shutil.copy(other, first)
    with pytest.raises(
        IntegrityError,
        match=r"the (content of trial|settings of another)",
    ):
        trials_in(tmp_path).trial(1.0, 1e-3, 10)


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", "null", '{"figures": [1]}', "\x00"])
def test_what_is_no_trial_is_named(tmp_path: Path, text: str) -> None:
    trials_in(tmp_path).trial(1.0, 1e-3, 10)
    kept(tmp_path).write_text(text)
    with pytest.raises(IntegrityError, match="the file of a trial is valid JSON"):
        trials_in(tmp_path).trial(1.0, 1e-3, 10)


KEY = {"kind": "judged", "settings": "b" * 64}
STEM = "judged-own"
ROW = dict.fromkeys(("answers", "scored", "reward", "kl", "tokens", "truncated"), 2.0)


def write_answers(folder: Path, start: int, stop: int, reward: float) -> Path:
    rows = [{"prompt": "p", **ROW, "reward": reward}]
    path = folder / answers_name(STEM, range(start, stop))
    path.write_text(trial_text(path, {**KEY, "causes": {}, "prompts": rows}))
    return path


def test_damaged_answers_are_found(tmp_path: Path) -> None:
    """Flipped bits; the answers of other numbers; and the file without its hash."""
    seed = random.randrange(2**32)
    drawn = random.Random(seed)
    first, second = (write_answers(tmp_path, n, n + 2, float(n)) for n in (0, 2))
    found, number = read_answers(tmp_path, STEM, 4)
    assert found is not None
    assert (number, found.sums[2].tolist()) == (4, [2.0])
    whole = second.read_bytes()
    content: dict[str, Any] = json.loads(whole)
    without = {name: own for name, own in content.items() if name != "sha256"}
    changes = [flipped(whole, drawn) for _ in range(40)]
    changes += [first.read_bytes(), json.dumps(without).encode(), whole[:-20]]
    for changed in changes:
        second.write_bytes(changed)
        with pytest.raises(IntegrityError, match="the answers are then sampled again"):
            read_answers(tmp_path, STEM, 4)
    diverged = tmp_path / f"{STEM}-diverged.json"
    assert not read_diverged(diverged)
    diverged.write_text(trial_text(diverged, {**KEY, "diverged": True}))
    assert read_diverged(diverged)
    diverged.write_bytes(flipped(diverged.read_bytes(), drawn))
    with pytest.raises(IntegrityError, match="the trial is then repeated"):
        read_diverged(diverged)


Edit = Callable[[bytes], bytes]


def test_a_damaged_policy_of_a_trial_is_found(tmp_path: Path) -> None:
    """Bits of its tensors, and a cut end. A file of an earlier version has no hash."""
    path = tmp_path / "policy.safetensors"
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(1.5, dtype=torch.bfloat16)}
    write_parameters(tensors, path)
    found = read_parameters(path)
    assert all(torch.equal(found[name], own) for name, own in tensors.items())
    whole = path.read_bytes()
    n_data = 6 * 4 + 2  # bytes of the tensors, at the end of the file
    changes: list[bytes] = []
    for at in range(len(whole) - n_data, len(whole)):
        changes.append(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
    changes += [whole[:-1], whole[:40], whole.replace(b"sha256", b"sha257")]
    for changed in changes:
        path.write_bytes(changed)
        with pytest.raises(IntegrityError, match="the policy is then trained again"):
            read_parameters(path)
    save_file(tensors, path)
    assert read_parameters(path).keys() == tensors.keys()


def test_a_damaged_result_of_a_search_is_found(tmp_path: Path) -> None:
    """The report refuses it; a file of an earlier version has no hash."""
    path = tmp_path / "tune.json"
    path.write_text(trial_text(path, {"beta": 0.5, "trials": []}))
    assert read_tune(tmp_path) == {
        "path": str(tmp_path),
        "finished": True,
        "proposes": False,
        "beta": 0.5,
        "trials": [],
    }
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(IntegrityError, match="run `gvpo-offline tune` again"):
        read_tune(tmp_path)
    path.write_text('{"beta": 0.5, "trials": []}')
    assert read_tune(tmp_path)["beta"] == 0.5
