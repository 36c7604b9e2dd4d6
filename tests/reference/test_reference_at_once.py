"""`reference` and `reward` need no lock of the dataset: processes at once lose nothing."""

from __future__ import annotations

import json
from pathlib import Path

from support.fork_server import ForkServer
from support.rewarding import answered_dataset, functions
from support.training import copy_of, score, sidecars, unscored_dataset

from gvpo_offline.store.dataset import open_dataset


def test_two_references_at_once_are_one(
    tmp_path: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    """Both commit the same files, by exclusive creation, and both end with success."""
    root = unscored_dataset(tmp_path / "data", tiny_model_dir, 24)
    alone = copy_of(root, tmp_path / "alone")
    expected = score(alone, tiny_model_dir).manifest.references
    argv = ["reference", "--dataset", root, "--model_name_or_path", tiny_model_dir]
    argv += ["--use_cpu", "true", "--show_progress", "false"]
    children = [server.start(argv) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0], [child.output for child in children]
    assert open_dataset(root).manifest.references == expected
    assert sidecars(root) == sidecars(alone)


def test_rewards_of_different_names_at_once_are_all_kept(
    tmp_path: Path, server: ForkServer
) -> None:
    """Each publishes the next version of the dataset, on top of those before it."""
    root = answered_dataset(tmp_path / "data", 8)
    scorers = {"s": {"kind": "function", "function": f"{functions(tmp_path)}:length"}}
    argv = ["reward", "--dataset", root, "--scorers", json.dumps(scorers)]
    children = [server.start([*argv, "--name", name]) for name in ("one", "two", "three")]
    assert [child.wait() for child in children] == [0, 0, 0], [own.output for own in children]
    found = [own.name for own in open_dataset(root, join=()).manifest.rewards]
    assert sorted(found) == ["one", "three", "two"]
