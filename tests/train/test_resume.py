"""Resuming after a kill, an interrupted save or a full disk: a run continues exactly from a
complete checkpoint, or reports why it cannot.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.builders import training_table
from support.fork_server import ForkServer
from support.rounding import adam_rounding
from support.training import same_weights, scored_dataset, trainer_of, weights_of

from gvpo_offline import GVPOTrainer
from gvpo_offline.errors import ConfigError, ResumeError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.checkpoint import SEAL_NAME, find_checkpoint, is_sealed

N_STEPS = 45
STEP = "gvpo_offline.train.trainer:GVPOTrainer.training_step"
SAVES_PER_CHECKPOINT = 4  # training_args.bin, optimizer.pt, scheduler.pt, rng_state.pth
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


@pytest.fixture(scope="module")
def command(dataset: GroupDataset, tiny_model_dir: Path) -> Command:
    """`train` for 45 steps with a checkpoint every third, of which one is kept."""
    settings = {
        "model_name_or_path": tiny_model_dir,
        "dataset": dataset.root,
        "beta": 0.5,
        "groups_per_step": 4,
        "max_tokens_per_micro_batch": 150,
        "learning_rate": 1e-2,
        "max_steps": N_STEPS,
        "save_steps": 3,
        "save_total_limit": 1,
        "use_cpu": "true",
        "disable_tqdm": "true",
        "resume_from_checkpoint": "auto",
    }

    def build(output_dir: Path, **changes: Any) -> list[str]:
        flags = {**settings, "output_dir": output_dir, **changes}
        return ["train", *(str(w) for name, value in flags.items() for w in (f"--{name}", value))]

    return build


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, command: Command, server: ForkServer
) -> dict[str, torch.Tensor]:
    """The final weights of a run that was not interrupted."""
    out = tmp_path_factory.mktemp("undisturbed")
    status, output = server.run(command(out))
    assert status == 0, output
    return load_file(out / "model.safetensors")


def whole_checkpoints(output_dir: Path) -> list[str]:
    return sorted(p.name for p in output_dir.glob("checkpoint-*") if is_sealed(p))


def finish(server: ForkServer, argv: list[str], output_dir: Path) -> dict[str, torch.Tensor]:
    """Run the command to its end and load the final weights."""
    status, output = server.run(argv)
    assert status == 0, output
    return load_file(output_dir / "model.safetensors")


# ---- killed ----


def test_killed_at_five_random_moments(
    tmp_path: Path, command: Command, undisturbed: dict[str, torch.Tensor], server: ForkServer
) -> None:
    """Each attempt is killed 1 to 40 ms after the start of its second to fifth step: in a forward
    pass, an update or a save. The final weights equal those of the run without interruption.
    """
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    for _ in range(5):
        kill = [STEP, moments.randint(2, 5), moments.uniform(0.001, 0.04)]
        child = server.start(command(tmp_path), kill_at=kill)
        assert child.wait() == -9, f"seed {seed}\n{child.output}"
    assert same_weights(finish(server, command(tmp_path), tmp_path), undisturbed), f"seed {seed}"
    assert whole_checkpoints(tmp_path) == [f"checkpoint-{N_STEPS}"]


def test_killed_while_a_checkpoint_is_written(
    tmp_path: Path, command: Command, undisturbed: dict[str, torch.Tensor], server: ForkServer
) -> None:
    """The run is killed in its first save; then in each file of a later save, before the seal, and
    before the older checkpoint is removed. After the first complete checkpoint there is always one,
    although only one is kept, and an interrupted one is never resumed from.
    """
    assert server.start(command(tmp_path), kill_in_save=2).wait() == -9
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert whole_checkpoints(tmp_path) == []
    for number in range(1, SAVES_PER_CHECKPOINT + 1):
        # The attempt completes its first checkpoint and is killed in file `number` of its second.
        child = server.start(command(tmp_path), kill_in_save=SAVES_PER_CHECKPOINT + number)
        assert child.wait() == -9, child.output
        assert whole_checkpoints(tmp_path) == [f"checkpoint-{3 * number}"]
        cut = tmp_path / f"checkpoint-{3 * number + 3}"
        assert cut.is_dir()
        assert not is_sealed(cut)
    for place in ("seal_checkpoint", "rotate_sealed"):
        before = whole_checkpoints(tmp_path)
        child = server.start(
            command(tmp_path), kill_at=[f"gvpo_offline.train.checkpointing:{place}", 1, 0]
        )
        assert child.wait() == -9, child.output
        assert set(whole_checkpoints(tmp_path)) >= set(before)
    assert same_weights(finish(server, command(tmp_path), tmp_path), undisturbed)
    assert whole_checkpoints(tmp_path) == [f"checkpoint-{N_STEPS}"]
    # A finished run can be resumed, and does nothing.
    assert same_weights(finish(server, command(tmp_path), tmp_path), undisturbed)


# ---- no room ----


def test_no_room_for_a_checkpoint(
    tmp_path: Path, command: Command, undisturbed: dict[str, torch.Tensor], server: ForkServer
) -> None:
    """A limit on file sizes stops the save of the optimizer state, then that of the weights; then
    there is no limit.
    """
    assert server.start(command(tmp_path), kill_at=[STEP, 6, 0]).wait() == -9
    assert whole_checkpoints(tmp_path) == ["checkpoint-3"]
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-3").iterdir()}
    for largest in (sizes["optimizer.pt"], sizes["model.safetensors"]):
        status, output = server.run(command(tmp_path), file_bytes=largest - 1000)
        assert status == 1, output
        error = output.splitlines()[-1]
        assert error.startswith("gvpo-offline train: error:")
        assert "checkpoint-6: there must be room on the disk" in error
        assert "Traceback" not in output
        assert [p.name for p in tmp_path.glob("*checkpoint-*")] == ["checkpoint-3"]
        assert whole_checkpoints(tmp_path) == ["checkpoint-3"]
    assert same_weights(finish(server, command(tmp_path), tmp_path), undisturbed)


def test_no_room_for_the_trained_policy(
    tmp_path: Path, command: Command, server: ForkServer
) -> None:
    argv = command(tmp_path, save_strategy="no", max_steps=1)
    status, output = server.run(argv, file_bytes=60_000)
    assert status == 1, output
    assert "there must be room on the disk" in output.splitlines()[-1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting needs privileges; the limit on the size of files is tested above")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(
    small_disk: Path, command: Command, undisturbed: dict[str, torch.Tensor], server: ForkServer
) -> None:
    """Another file fills the disk after the first checkpoint; after its removal the run resumes."""
    assert server.start(command(small_disk), kill_at=[STEP, 5, 0]).wait() == -9
    assert whole_checkpoints(small_disk) == ["checkpoint-3"]
    neighbour = small_disk / "neighbour"
    neighbour.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    status, output = server.run(command(small_disk))
    assert status == 1, output
    assert "checkpoint-6: there must be room on the disk" in output.splitlines()[-1]
    assert whole_checkpoints(small_disk) == ["checkpoint-3"]
    assert not (small_disk / "checkpoint-6").exists()
    neighbour.unlink()
    assert same_weights(finish(server, command(small_disk), small_disk), undisturbed)


# ---- checkpoints of other runs ----

SETTINGS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
# So that what only moves rounding moves weights by rounding; see `adam_rounding`.
SETTINGS["adam_epsilon"] = 1.0


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, dataset: GroupDataset, tiny_model_dir: Path
) -> Path:
    """The folder of a run of 6 steps, with checkpoints 2, 4 and 6."""
    out = tmp_path_factory.mktemp("finished") / "out"
    trainer_of(tiny_model_dir, dataset, out, **SETTINGS).train()
    return out


def test_resuming_from_any_checkpoint_ends_in_the_same_weights(
    finished: Path, dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Later checkpoints that already exist in the folder are overwritten."""
    final = load_file(finished / "checkpoint-6" / "model.safetensors")
    for step in (2, 4):
        out = shutil.copytree(finished, tmp_path / str(step))
        trainer = trainer_of(tiny_model_dir, dataset, out, **SETTINGS)
        result = trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
        assert result.global_step == 6
        mine = weights_of(trainer)
        assert all(torch.equal(mine[name], final[name]) for name in final)
        assert whole_checkpoints(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"beta": 0.6}, "objective.beta: 0.5 then, 0.6 now"),
        ({"anchor": 0.1}, "objective.anchor: 0.0 then, 0.1 now"),
        ({"seed": 2}, "data.seed: 1 then, 2 now; optimization.seed: '1' then, '2' now"),
        ({"learning_rate": 0.02}, "optimization.learning_rate: '0.01' then, '0.02' now"),
        ({"groups_per_step": 7}, "data.groups_per_step: 8 then, 7 now; data.n_draws: 48 then, 42"),
        ({"max_steps": 7}, "data.n_draws: 48 then, 56 now"),
        ({"eval_fraction": 0.3}, "data.selection: None then, '"),
        ({"shuffle_window": 2}, "data.shuffle_window: 4 then, 2 now"),
        ({"weight_decay": 0.1}, "optimization.weight_decay: '0.0' then, '0.1' now"),
        ({"bf16": True}, "optimization.bf16: 'False' then, 'True' now"),
        ({"disable_dropout": False}, "optimization.disable_dropout: 'True' then, 'False' now"),
    ],
)
def test_other_settings_are_named_and_refused(
    finished: Path,
    dataset: GroupDataset,
    tiny_model_dir: Path,
    changes: dict[str, Any],
    named: str,
) -> None:
    trainer = trainer_of(tiny_model_dir, dataset, finished, **{**SETTINGS, **changes})
    before = weights_of(trainer)
    with pytest.raises(ResumeError, match="checkpoint-6: a run resumes with") as error:
        trainer.train(resume_from_checkpoint=True)
    assert named in str(error.value)
    assert same_weights(before, weights_of(trainer))


def test_settings_that_only_change_rounding_may_change(
    finished: Path, dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    other = {"max_tokens_per_micro_batch": 10**6, "logging_steps": 3, "save_steps": 3}
    trainer = trainer_of(tiny_model_dir, dataset, out, **{**SETTINGS, **other})
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    final = load_file(finished / "checkpoint-6" / "model.safetensors")
    mine = weights_of(trainer)
    most = adam_rounding(6, learning_rate=1e-2, epsilon=1.0)
    assert max(float((mine[n] - final[n]).abs().max()) for n in final) <= most


def test_other_data_are_named_and_refused(
    finished: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = scored_dataset(tmp_path / "data", tiny_model_dir, 24, seed=1)
    trainer = trainer_of(tiny_model_dir, other, finished, **SETTINGS)
    with pytest.raises(ResumeError, match=r"data\.files: '[0-9a-f]{11}…' then"):
        trainer.train(resume_from_checkpoint=True)


def test_another_model_is_named_and_refused(finished: Path, dataset: GroupDataset) -> None:
    from support.tiny_models import tiny_model

    model = tiny_model("llama")
    model.resize_token_embeddings(400)
    trainer = trainer_of(model, dataset, finished, reference_check="off", **SETTINGS)
    with pytest.raises(ResumeError, match=r"model\.class: 'Qwen3ForCausalLM' then"):
        trainer.train(resume_from_checkpoint=True)


# ---- incomplete checkpoints ----


@pytest.fixture
def resuming(
    finished: Path, dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> tuple[GVPOTrainer, Path]:
    """A trainer on a copy of the finished run's folder."""
    out = shutil.copytree(finished, tmp_path / "out")
    return trainer_of(tiny_model_dir, dataset, out, **SETTINGS), out


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_damaged_file_is_named(resuming: tuple[GVPOTrainer, Path], name: str, how: str) -> None:
    trainer, out = resuming
    path = out / "checkpoint-6" / name
    size = path.stat().st_size
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ResumeError, match=f"has {size} bytes; received") as error:
        trainer.train(resume_from_checkpoint=True)
    assert error.value.file == str(path)
    assert "resume from another checkpoint" in str(error.value).lower()
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))  # the remedy in the error


def test_a_checkpoint_without_seal_is_not_resumed(resuming: tuple[GVPOTrainer, Path]) -> None:
    """Without the mark of an interrupted save as well, the checkpoint before it is not taken."""
    trainer, out = resuming
    (out / "checkpoint-6" / SEAL_NAME).unlink()
    for wanted in (True, "auto"):
        with pytest.raises(ResumeError, match=r"checkpoint-6: .*move checkpoint-6 away"):
            find_checkpoint(out, wanted)
    (out / "checkpoint-6" / "gvpo_checkpoint_begun").touch()
    assert find_checkpoint(out, True) == out / "checkpoint-4"
    with pytest.raises(ResumeError, match="checkpoint-6: a complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-6"))
    with pytest.raises(ResumeError, match="received no such folder"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-8"))
    for step in (2, 4):
        (out / f"checkpoint-{step}" / SEAL_NAME).unlink()
    with pytest.raises(
        ResumeError, match=r"out: resuming needs a complete checkpoint.*received none"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_auto_starts_a_new_run_if_there_is_no_checkpoint(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path / "out", **SETTINGS)
    assert trainer.train(resume_from_checkpoint="auto").global_step == 6
    with pytest.raises(ResumeError, match="resuming needs a complete checkpoint"):
        trainer_of(tiny_model_dir, dataset, tmp_path / "new").train(resume_from_checkpoint=True)


def test_a_damaged_seal_is_named(resuming: tuple[GVPOTrainer, Path]) -> None:
    trainer, out = resuming
    (out / "checkpoint-6" / SEAL_NAME).write_text('{"step": 6, "resum')
    with pytest.raises(ResumeError, match="the seal of a checkpoint is valid JSON"):
        trainer.train(resume_from_checkpoint=True)


def test_weights_alone_do_not_resume(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """transformers would silently continue with a new optimizer."""
    settings = {**SETTINGS, "save_only_model": True}
    trainer_of(tiny_model_dir, dataset, tmp_path / "out", **settings).train()
    assert not (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").exists()
    again = trainer_of(tiny_model_dir, dataset, tmp_path / "out", **settings)
    with pytest.raises(ResumeError, match=r"weights alone \(save_only_model\)"):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))


def test_a_new_run_among_checkpoints_is_refused(resuming: tuple[GVPOTrainer, Path]) -> None:
    trainer, out = resuming
    with pytest.raises(ConfigError, match=r"received checkpoint-2.*resume_from_checkpoint=True"):
        trainer.train()
    assert len(whole_checkpoints(out)) == 3


def test_a_run_on_data_in_memory_resumes(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Each process writes the data to its own temporary file, whose content is always the same."""
    groups = [group for i in range(dataset.n_row_groups) for group in dataset.groups(i)]
    path = tmp_path / "groups.parquet"
    pq.write_table(training_table(groups), path)

    def trainer() -> GVPOTrainer:
        cache = str(tmp_path / "cache")
        data = datasets.Dataset.from_parquet(str(path), cache_dir=cache)
        return trainer_of(tiny_model_dir, data, tmp_path / "out", **SETTINGS)

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert same_weights(weights_of(whole), weights_of(resumed))
