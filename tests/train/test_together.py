"""Collectives: slices that cover a sequence, results on all ranks, and errors on all ranks."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.builders import build_dataset
from torch.multiprocessing.spawn import start_processes

from gvpo_offline.collectives import (
    broadcast_from_rank0,
    gather_results,
    local_rank_slice,
    raise_together,
    rank_slice,
)
from gvpo_offline.errors import DataError, GVPOError, IntegrityError, WorkerError
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.survey import Survey, survey
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.preflight import surveys, verify

N_RANKS = 3


# ---- one process ----


def test_a_single_process_has_the_whole_slice_and_raises_its_errors() -> None:
    assert rank_slice() == local_rank_slice() == slice(None)
    assert raise_together(lambda: 1) == broadcast_from_rank0(lambda: 1) == 1
    assert gather_results(lambda: 1) == [1]
    for together in (raise_together, broadcast_from_rank0, gather_results):
        with pytest.raises(KeyError):
            together(lambda: {}[0])  # type: ignore[operator]


@given(st.integers(0, 40), st.integers(1, 9))
def test_slices_cover_the_sequence(n_items: int, n_parts: int) -> None:
    """For every number of slices, also if it exceeds the number of items."""
    parts = [list(range(n_items)[slice(i, None, n_parts)]) for i in range(n_parts)]
    assert sorted(item for part in parts for item in part) == list(range(n_items))


@pytest.mark.parametrize("n_parts", [1, 2, 3, 7])
def test_surveys_of_parts_add_up_to_the_survey(tmp_path: Path, n_parts: int) -> None:
    """Each part has every n-th row group; with 7 parts for 5 row groups, two parts are empty."""
    build_dataset(tmp_path, 20)
    dataset = open_dataset(tmp_path)
    assert dataset.n_row_groups == 5
    whole = survey(dataset)
    total = Survey()
    for part in reversed(range(n_parts)):  # in any order
        total = total + survey(dataset, part=slice(part, None, n_parts))
    assert_same(total, whole)


def assert_same(one: Survey, other: Survey) -> None:
    mine, theirs = vars(one).copy(), vars(other).copy()
    assert np.array_equal(mine.pop("gap_bins"), theirs.pop("gap_bins"))
    # The order of the summation differs.
    assert mine.pop("sampler_rewards") == pytest.approx(theirs.pop("sampler_rewards"))
    assert mine == theirs


def test_of_several_longest_rows_the_first_is_named() -> None:
    first, second = (Survey(max_row_tokens=9, longest_row=(n, 0, "g")) for n in (1, 2))
    assert (second + first).longest_row == (1, 0, "g")
    assert (Survey(max_row_tokens=8) + second).longest_row == (2, 0, "g")


# ---- three processes ----


def _raising(error: Exception) -> Any:
    raise error


def _attempts(rank: int, root: Path) -> dict[str, Any]:
    """All ways to succeed and to fail, one after the other.

    If a rank were out of step after one of them, a later one would hang or give another result.
    """
    return {
        "each": gather_results(lambda: rank),
        "first": broadcast_from_rank0(lambda: rank),
        "own": raise_together(lambda: rank),
        "one fails": _caught(
            lambda: gather_results(
                lambda: _raising(DataError("rule", row=7)) if rank == 1 else rank
            )
        ),
        "first fails": _caught(
            lambda: broadcast_from_rank0(lambda: _raising(DataError(f"by {rank}")))
        ),
        "all fail": _caught(lambda: gather_results(lambda: _raising(DataError(f"by {rank}")))),
        "a bug": _caught(lambda: raise_together(lambda: _raising(KeyError(5)) if rank == 2 else 0)),
        # Rank 1 fails before the inner collective, the others in it.
        "nested": _caught(
            lambda: raise_together(
                lambda: (
                    _raising(DataError("early"))
                    if rank == 1
                    else broadcast_from_rank0(lambda: rank)
                )
            )
        ),
        "damaged": _caught(lambda: verify([open_dataset(root / "bad")], content=True)),
        "survey": surveys([DatasetView(open_dataset(root / "good"))])[0],
        "after": gather_results(lambda: rank),
    }


def _caught(work: Any) -> tuple[str, str]:
    try:
        return "nothing", str(work())
    except Exception as error:
        return type(error).__name__, str(error)


def _rank(rank: int, port: int, root: str) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(N_RANKS)}
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=N_RANKS)
    try:
        found = _attempts(rank, Path(root))
        (Path(root) / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid dataset, and one with a flipped bit in one of its files."""
    root = tmp_path_factory.mktemp("together")
    for name in ("good", "bad"):
        build_dataset(root / name, 20)
    dataset = open_dataset(root / "bad")
    damaged = dataset.root / dataset.files()[-1].path
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    return root


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, Any]]:
    """The results of each of three processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked, because importing everything again would take each process seconds.
    start_processes(_rank, (port, str(root)), nprocs=N_RANKS, start_method="fork")
    return [pickle.loads((root / f"{rank}.pickle").read_bytes()) for rank in range(N_RANKS)]


def test_all_ranks_get_the_results(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert found["each"] == found["after"] == [0, 1, 2]
        assert found["first"] == 0
        assert found["own"] == rank


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("one fails", DataError, "row 7: rule. Rows are counted from 0."),
        ("first fails", DataError, "by 0."),
        ("nested", DataError, "early."),
    ],
)
def test_an_error_of_one_rank_is_raised_by_all(
    ranks: list[dict[str, Any]], case: str, kind: type[GVPOError], message: str
) -> None:
    for found in ranks:
        assert found[case] == (kind.__name__, message)


def test_errors_of_several_ranks_are_raised_as_the_first(ranks: list[dict[str, Any]]) -> None:
    assert [found["all fail"] for found in ranks] == [("DataError", "by 0.")] * N_RANKS


def test_a_bug_is_raised_on_its_rank_and_named_on_the_others(ranks: list[dict[str, Any]]) -> None:
    assert ranks[2]["a bug"] == ("KeyError", "5")
    for found in ranks[:2]:
        kind, message = found["a bug"]
        assert kind == WorkerError.__name__
        assert "KeyError on rank 2: 5" in message


def test_a_damaged_file_that_one_rank_finds_stops_all(
    ranks: list[dict[str, Any]], root: Path
) -> None:
    with pytest.raises(IntegrityError) as alone:
        open_dataset(root / "bad").verify()
    for found in ranks:
        assert found["damaged"] == (IntegrityError.__name__, str(alone.value))


def test_ranks_survey_a_dataset_together(ranks: list[dict[str, Any]], root: Path) -> None:
    whole = survey(open_dataset(root / "good"))
    for found in ranks:
        assert_same(found["survey"], whole)
