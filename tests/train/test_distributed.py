"""A run on two processes (gloo) equals the run on one process up to rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.fork_server import ForkServer
from support.rounding import adam_rounding
from support.training import largest_difference, train_command, unequal_dataset

from gvpo_offline.store.dataset import GroupDataset, open_dataset

# Metrics that depend on the clock.
TIMES = {"tokens_per_second", "data_wait_share", "eval_runtime", "total_flos", "peak_memory_gb"}
TIMES |= {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    """25 groups of 2 to 12 responses with 1 to 60 tokens each: the work per group is unequal."""
    return unequal_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 25)


def history(output_dir: Path) -> list[dict[str, float]]:
    state = json.loads((output_dir / "trainer_state.json").read_text())
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in state["log_history"]]
    # Rounding orders two equal log-ratios either way; test_ranks allows for it.
    return [{k: v for k, v in line.items() if "pair_accuracy" not in k} for line in lines]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    dataset: GroupDataset,
    tiny_model_dir: Path,
    server: ForkServer,
) -> dict[int, Path]:
    """Folders of the run on one process and on two processes, by number of processes."""
    folders = {n: tmp_path_factory.mktemp(f"ranks{n}") / "out" for n in (1, 2)}
    for n, folder in folders.items():
        ended = server.run_ranks(train_command(dataset, tiny_model_dir, folder), n)
        assert [status for status, _ in ended] == [0] * n, "\n".join(text for _, text in ended)
    return folders


def test_the_last_step_has_fewer_groups_than_there_are_ranks(runs: dict[int, Path]) -> None:
    """25 groups in steps of 12: in the third step one of two ranks has an empty share."""
    for folder in runs.values():
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["global_step"] == 3
        assert state["epoch"] == 1


def test_two_processes_train_the_same_weights_as_one(runs: dict[int, Path]) -> None:
    one, two = (load_file(runs[n] / "model.safetensors") for n in (1, 2))
    assert largest_difference(one, two) <= adam_rounding(3)


def test_two_processes_log_the_same_metrics_as_one(runs: dict[int, Path]) -> None:
    """Loss, gradient norm, and all metrics of training and of held-out groups."""
    one, two = history(runs[1]), history(runs[2])
    assert [line.keys() for line in one] == [line.keys() for line in two]
    assert sum("eval_loss" in line for line in one) == 1
    assert sum("grad_norm" in line for line in one) == 3
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4, rel=1e-4)


def test_a_checkpoint_of_two_ranks_resumes_on_one_and_of_one_on_two(
    runs: dict[int, Path],
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    server: ForkServer,
) -> None:
    final = load_file(runs[1] / "model.safetensors")
    for saved_on, resumed_on in ((2, 1), (1, 2)):
        out = shutil.copytree(runs[saved_on], tmp_path / f"{saved_on}-{resumed_on}")
        checkpoint = out / "checkpoint-2"
        argv = train_command(dataset, tiny_model_dir, out, resume_from_checkpoint=checkpoint)
        for status, output in server.run_ranks(argv, resumed_on):
            assert status == 0, output
        mine = load_file(out / "model.safetensors")
        assert largest_difference(mine, final) <= adam_rounding(3)
        assert history(out)[-2] == pytest.approx(history(runs[1])[-2], abs=1e-4, rel=1e-4)


def test_an_error_stops_every_rank(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """An error that every rank finds before the first collective operation."""
    (tmp_path / "notes.txt").write_text("x")
    for status, output in server.run_ranks(train_command(dataset, tiny_model_dir, tmp_path), 2):
        assert status == 1
        assert "a new run's output_dir is empty" in output
        assert "Traceback" not in output


def test_a_damaged_file_that_one_rank_finds_stops_both(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """Each rank verifies every second file; both ranks name the damaged one."""
    root = shutil.copytree(dataset.root, tmp_path / "data")
    entry = dataset.files()[1]
    content = bytearray((root / entry.path).read_bytes())
    content[len(content) // 2] ^= 1
    (root / entry.path).write_bytes(content)
    copy = open_dataset(root)
    argv = train_command(copy, tiny_model_dir, tmp_path / "out")
    outputs = []
    for status, output in server.run_ranks(argv, 2):
        assert status == 1
        assert "Traceback" not in output
        outputs.append(output.splitlines()[-1])
    assert entry.path in outputs[0]
    assert outputs[0] == outputs[1]


def test_no_space_for_a_checkpoint_stops_every_rank(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """Only the first rank writes weights; the other one does not hang."""
    argv = train_command(dataset, tiny_model_dir, tmp_path / "out")
    ended = server.run_ranks(argv, 2, file_bytes=60_000)
    assert [status for status, _ in ended] == [1, 1]
    first, second = (output.splitlines()[-1] for _, output in ended)
    assert "checkpoint-2: there must be room on the disk" in first
    assert "every rank does its part; received" in second
    assert "on rank 0" in second
    assert not list((tmp_path / "out").glob("checkpoint-*"))
