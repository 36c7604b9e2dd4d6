"""Damage to the files of a checkpoint: every change is found, and named, before anything is loaded.

The checkpoints are those of a short run of a tiny model, and of a search by trials.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from support.training import scored_dataset, trainer_of, weights_of

from gvpo_offline import GVPOTrainer
from gvpo_offline.compute.adapters import load_policy
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import IntegrityError, ResumeError
from gvpo_offline.hashing import hashed_json, own_hash_holds, sha256_file
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.checkpoint import SEAL_NAME, find_checkpoint, rotate_sealed
from gvpo_offline.train.checkpoint_files import damaged_files, faults, intact_before
from gvpo_offline.train.checkpointing import verify_contents

SETTINGS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
LATER = 4_000_000_000  # a time of the year 2096


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, dataset: GroupDataset, tiny_model_dir: Path
) -> Path:
    """The folder of a run of 6 steps, with checkpoints 2, 4 and 6."""
    out = tmp_path_factory.mktemp("finished") / "out"
    trainer_of(tiny_model_dir, dataset, out, **SETTINGS).train()
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


def files_of(checkpoint: Path) -> list[str]:
    return sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())


def flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


# ---- every change is found ----


def test_the_seal_holds_the_hash_of_every_file(out: Path) -> None:
    """What `sha256sum` prints for each; and the run's checkpoints are all intact."""
    checkpoint = out / "checkpoint-6"
    seal = json.loads((checkpoint / SEAL_NAME).read_text())
    names = [name for name in files_of(checkpoint) if name != SEAL_NAME]
    assert seal["sha256"] == {name: sha256_file(checkpoint / name) for name in names}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(names)
    assert [damaged_files(out / f"checkpoint-{step}") for step in (2, 4, 6)] == [[], [], []]


def test_every_random_change_of_any_file_is_found(out: Path) -> None:
    """Of each file, the seal included: a flipped bit, another byte, a cut end, a longer end, the
    file of another step (where that differs), and no file. Only the changed file is named.
    """
    seed = random.randrange(2**32)
    drawn = random.Random(seed)
    checkpoint, other = out / "checkpoint-6", out / "checkpoint-4"
    n_changes = 0
    for name in files_of(checkpoint):
        path = checkpoint / name
        whole = path.read_bytes()
        at = [drawn.randrange(len(whole)) for _ in range(4)]
        changes = [
            whole[: at[0]] + bytes([whole[at[0]] ^ 1 << drawn.randrange(8)]) + whole[at[0] + 1 :],
            whole[: at[1]] + bytes([(whole[at[1]] + 1) % 256]) + whole[at[1] + 1 :],
            whole[: at[2]],
            whole + drawn.randbytes(1 + at[3] % 9),
            (other / name).read_bytes(),
        ]
        for content in changes:
            if content != whole:
                path.write_bytes(content)
                assert damaged_files(checkpoint) == [name], f"seed {seed}"
                n_changes += 1
        path.unlink()
        assert damaged_files(checkpoint) == [name]
        path.write_bytes(whole)
    assert damaged_files(checkpoint) == []
    assert n_changes >= 4 * 8


def test_every_byte_of_a_seal_counts(out: Path) -> None:
    """One bit of each in turn, white space included; some of them in the file itself."""
    path = out / "checkpoint-6" / SEAL_NAME
    whole = path.read_bytes()
    assert own_hash_holds(whole.decode(), json.loads(whole), "seal_sha256")
    for at in range(len(whole)):
        changed = whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :]
        try:
            content = json.loads(changed)
        except ValueError:
            continue
        assert not own_hash_holds(changed.decode(), content, "seal_sha256")
    for changed in (whole.replace(b" ", b"\t", 1), whole + b" ", whole.replace(b"\n", b"\r\n")):
        path.write_bytes(changed)
        assert damaged_files(path.parent) == [SEAL_NAME]


TEXTS = st.text('ab{}[]":, \\né', max_size=4)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(TEXTS, st.one_of(st.integers(), st.floats(allow_nan=False), TEXTS)), st.data()
)
def test_a_text_with_its_own_hash_is_found_changed(content: dict[str, Any], data: Any) -> None:
    """Any other text does not hold, also one that is still JSON."""
    content.pop("own", None)
    text = hashed_json(content, "own")
    assert json.loads(text).keys() == {*content, "own"}
    assert own_hash_holds(text, json.loads(text), "own")
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(TEXTS) + text[at + 1 :]
    try:
        found = json.loads(changed)
    except ValueError:
        return
    if changed != text and isinstance(found, dict):
        assert not own_hash_holds(changed, found, "own")


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    "edit",
    [
        lambda seal: seal.update(step=5),
        lambda seal: seal["identity"]["objective"].update(beta=0.6),
        lambda seal: seal["lines"].update({"events.jsonl": 1}),
        lambda seal: seal["files"].update({"model.safetensors": 7}),
        lambda seal: seal["files"].pop("optimizer.pt"),
        lambda seal: seal["sha256"].update({"optimizer.pt": "0" * 64}),
        lambda seal: seal["loss"].update(sums=[0.0]),
        lambda seal: seal.pop("seal_sha256"),
        lambda seal: seal.pop("sha256"),
        lambda seal: seal.update(files={"../../victim": 1}),
    ],
)
def test_an_edited_seal_is_found(out: Path, edit: Change) -> None:
    path = out / "checkpoint-6" / SEAL_NAME
    seal = json.loads(path.read_text())
    edit(seal)
    path.write_text(json.dumps(seal, indent=1, sort_keys=True))
    with pytest.raises(ResumeError, match=r"gvpo_checkpoint.json: the seal of a checkpoint"):
        find_checkpoint(out, "auto")


@pytest.mark.parametrize("content", ["[1]", '{"step": 6}', "[" * 10**5, "", "\x00", "null"])
def test_a_seal_that_is_no_seal_is_named(out: Path, content: str) -> None:
    (out / "checkpoint-6" / SEAL_NAME).write_text(content)
    with pytest.raises(ResumeError, match="the seal of a checkpoint is valid JSON"):
        find_checkpoint(out, True)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "adapter_model.safetensors", "rng_state_1.pth", "scaler.pt"]
)
def test_a_file_that_would_be_loaded_as_well_is_found(out: Path, name: str) -> None:
    """Files that transformers does not load, as callbacks write them, do not matter."""
    checkpoint = out / "checkpoint-6"
    (checkpoint / "notes.txt").write_text("the best so far")
    (checkpoint / "ema.pt").write_bytes(b"of a callback")
    assert damaged_files(checkpoint) == []
    (checkpoint / name).write_bytes(b"x")
    assert damaged_files(checkpoint) == [name]


def test_a_checkpoint_in_the_place_of_another_is_found(out: Path) -> None:
    shutil.rmtree(out / "checkpoint-6")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-6")
    with pytest.raises(ResumeError, match=r"the seal of checkpoint-6 .* received step 2\."):
        find_checkpoint(out, True)


def test_the_ranks_share_the_files(out: Path) -> None:
    """Each of three ranks of a machine reads some of them; together they read all."""
    checkpoint = out / "checkpoint-6"
    names = [name for name in files_of(checkpoint) if name != SEAL_NAME]
    for name in names:
        flip(checkpoint / name, 5, 0)
    parts = [faults(checkpoint, part=slice(rank, None, 3)) for rank in range(3)]
    assert all(parts)
    assert sorted(name for part in parts for name in part) == names


# ---- what the run does ----


def resumed(out: Path, dataset: GroupDataset, model: Path, **changes: Any) -> GVPOTrainer:
    return trainer_of(model, dataset, out, **{**SETTINGS, **changes})


@pytest.mark.parametrize("wanted", [True, "auto"])
def test_a_damaged_newest_checkpoint_stops_the_run(
    out: Path, dataset: GroupDataset, tiny_model_dir: Path, wanted: Any
) -> None:
    """One bit of its optimizer state and of its weights. The error names both files and the newest
    intact checkpoint, here that of step 2, as the one of step 4 is damaged too. What the error
    advises works, and ends in the same weights.
    """
    final = weights_of(resumed(out, dataset, tiny_model_dir))
    for step, name in ((6, "optimizer.pt"), (6, "model.safetensors"), (4, "model.safetensors")):
        flip(out / f"checkpoint-{step}" / name, 3000, 2)
    trainer = resumed(out, dataset, tiny_model_dir)
    with pytest.raises(ResumeError) as error:
        trainer.train(resume_from_checkpoint=wanted)
    message = str(error.value)
    assert error.value.file == str(out / "checkpoint-6" / "model.safetensors")
    assert "has the content that was saved; received SHA-256" in message
    assert "damaged as well: optimizer.pt" in message
    intact = out / "checkpoint-2"
    assert f"another checkpoint: {intact} is intact" in message
    assert "move checkpoint-6 away" in message
    assert all((final[n] == own).all() for n, own in weights_of(trainer).items())  # none loaded
    trainer.train(resume_from_checkpoint=str(intact))
    assert [damaged_files(out / f"checkpoint-{step}") for step in (2, 4, 6)] == [[], [], []]


def test_an_edited_step_of_the_state_is_found(
    out: Path, dataset: GroupDataset, tiny_model_dir: Path
) -> None:
    """Of the same number of digits, so that the file has its size; also with an old seal."""
    path = out / "checkpoint-6" / "trainer_state.json"
    path.write_text(path.read_text().replace('"global_step": 6', '"global_step": 5'))
    with pytest.raises(ResumeError, match=r"checkpoint of step 6 .* global_step; received 5\."):
        find_checkpoint(out, True)
    with_earlier_seal(path.parent)
    with pytest.raises(ResumeError, match=r"checkpoint of step 6 .* global_step; received 5\."):
        find_checkpoint(out, True)


def with_earlier_seal(checkpoint: Path) -> None:
    """Write the seal as earlier versions did: without hashes."""
    path = checkpoint / SEAL_NAME
    seal = json.loads(path.read_text())
    for name in ("sha256", "seal_sha256", "loss"):
        del seal[name]
    path.write_text(json.dumps(seal, indent=1, sort_keys=True))


def test_a_checkpoint_of_an_earlier_version_resumes(
    out: Path, dataset: GroupDataset, tiny_model_dir: Path
) -> None:
    """Its seal has sizes alone."""
    with_earlier_seal(out / "checkpoint-4")
    trainer = resumed(out, dataset, tiny_model_dir)
    found = trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert found.global_step == 6
    flip(out / "checkpoint-2" / "optimizer.pt", 3000, 2)
    with_earlier_seal(out / "checkpoint-2")
    assert damaged_files(out / "checkpoint-2") == []
    (out / "checkpoint-2" / "optimizer.pt").write_bytes(b"short")
    assert damaged_files(out / "checkpoint-2") == ["optimizer.pt"]


def test_the_newest_intact_checkpoint_is_found(out: Path) -> None:
    assert intact_before(out / "checkpoint-6") == out / "checkpoint-4"
    (out / "checkpoint-4" / SEAL_NAME).write_text("{")
    assert intact_before(out / "checkpoint-6") == out / "checkpoint-2"
    assert intact_before(out / "checkpoint-2") is None
    flip(out / "checkpoint-2" / SEAL_NAME, 50, 1)
    with pytest.raises(ResumeError, match="there is no intact earlier one beside it"):
        find_checkpoint(out, str(out / "checkpoint-2"))


def test_a_damaged_best_checkpoint_is_found_at_both_ends_of_a_run(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """When a run resumes, and before its weights are loaded at the end. The lowest pair_accuracy
    counts as the best, so that the best step is the second of six.
    """
    best_kept = {
        **SETTINGS,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "pair_accuracy",
        "greater_is_better": False,
        "eval_dataset": dataset,
    }
    out = tmp_path / "out"
    trainer = trainer_of(tiny_model_dir, dataset, out, **best_kept)
    trainer.train()
    best = out / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    flip(best / "model.safetensors", 3000, 2)
    again = trainer_of(tiny_model_dir, dataset, out, **best_kept)
    with pytest.raises(ResumeError, match=r"checkpoint-2.model.safetensors.*the best checkpoint"):
        again.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert again.state.global_step == 4
    trainer.state.best_model_checkpoint = str(best)
    with pytest.raises(ResumeError, match="set load_best_model_at_end: false"):
        trainer._load_best_model()
    flip(best / "model.safetensors", 3000, 2)
    trainer._load_best_model()


def test_damaged_weights_of_a_checkpoint_are_not_loaded_as_a_model(out: Path) -> None:
    """`model_name_or_path` set to it: a new run from its weights, an evaluation. A configuration
    may be edited. Without the seal, and with one of an earlier version, it is a model folder.
    """
    checkpoint = out / "checkpoint-6"
    settings = ModelSettings(model_name_or_path=str(checkpoint))
    config = checkpoint / "generation_config.json"
    config.write_text(config.read_text() + "\n")
    load_policy(settings)
    flip(checkpoint / "model.safetensors", 3000, 2)
    with pytest.raises(IntegrityError, match=r"model.safetensors: the weights of a checkpoint"):
        load_policy(settings)
    seal = (checkpoint / SEAL_NAME).read_text()
    with_earlier_seal(checkpoint)
    load_policy(settings)
    (checkpoint / SEAL_NAME).write_text(seal.replace("optimizer.pt", "optimizer.pu"))
    with pytest.raises(IntegrityError, match=r"gvpo_checkpoint.json: the seal .* move the seal"):
        load_policy(settings)
    (checkpoint / SEAL_NAME).unlink()
    load_policy(settings)


def test_damaged_weights_of_an_adapter_are_not_loaded(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A checkpoint of LoRA neither resumes nor loads."""
    settings = {**SETTINGS, "save_steps": 1, "max_steps": 2}
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])

    def trainer(name: str) -> GVPOTrainer:
        return trainer_of(tiny_model_dir, dataset, tmp_path / name, peft_config=lora, **settings)

    trainer("out").train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert damaged_files(checkpoint) == []
    load_policy(ModelSettings(model_name_or_path=str(checkpoint)))
    path = checkpoint / "adapter_model.safetensors"
    flip(path, path.stat().st_size - 3, 2)
    assert damaged_files(checkpoint) == [path.name]
    with pytest.raises(IntegrityError, match=r"adapter_model.safetensors: the weights"):
        load_policy(ModelSettings(model_name_or_path=str(checkpoint)))
    with pytest.raises(ResumeError, match=r"adapter_model.safetensors: the checkpoint's file"):
        trainer("new").train(resume_from_checkpoint=str(checkpoint))


def test_sharded_and_adapter_checkpoints_are_hashed_in_their_folders(tmp_path: Path) -> None:
    """The files of FSDP2's shards lie in subfolders; those of an adapter have other names."""
    from gvpo_offline.train.checkpoint import begin_checkpoint, seal_checkpoint

    folder = tmp_path / "checkpoint-7"
    begin_checkpoint(folder)
    names = ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__1_0.distcp"]
    names += ["optimizer_0/__0_0.distcp", "adapter_model.safetensors", "rng_state_1.pth"]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes([number]) * (number + 1))
    seal_checkpoint(folder, 7, {})
    verify_contents(folder)
    for name in names:
        flip(folder / name, 0, 3)
        assert damaged_files(folder) == [name]
        with pytest.raises(ResumeError, match=name):
            verify_contents(folder)
        flip(folder / name, 0, 3)


# ---- rotation ----


def test_checkpoints_with_clocks_ahead_are_rotated_by_step(
    out: Path, dataset: GroupDataset, tiny_model_dir: Path
) -> None:
    """Another machine's clock wrote the earlier checkpoints in the year 2096. The folders and all
    their files say so, and still the earliest steps go.
    """
    shutil.rmtree(out / "checkpoint-6")
    for step in (2, 4):
        folder = out / f"checkpoint-{step}"
        for path in [*folder.rglob("*"), folder]:
            os.utime(path, (LATER - step, LATER - step))
    trainer = resumed(out, dataset, tiny_model_dir, save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    kept = sorted(path.name for path in out.glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("wrong", [LATER, 1])
def test_sharded_checkpoints_are_rotated_by_step(tmp_path: Path, wrong: int) -> None:
    """Steps of one to four digits, in folders with subfolders; the best is kept."""
    for number, step in enumerate((9, 80, 700, 6000)):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
        (folder / SEAL_NAME).write_text("{}")
        for path in (folder / "pytorch_model_fsdp_0", folder):
            os.utime(path, (wrong + 10 - number, wrong + 10 - number))
    rotate_sealed(tmp_path, 2, ["checkpoint-6000", "checkpoint-9"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-6000", "checkpoint-9"]
