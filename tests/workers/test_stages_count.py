"""`sample`, `reference` and `reward` count within their tasks what their bars show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.importing import write_jsonl
from support.rewarding import answered_dataset, functions, reward
from support.sampling import FaultServer, config, local, prompt_rows, remote
from support.training import score, unscored_dataset

from gvpo_offline.sampling.run import run_sample
from gvpo_offline.workers import run
from gvpo_offline.workers.settings import WorkerSettings


class Bar:
    """What a run needs of tqdm's bar; records where it stood."""

    def __init__(self, **options: Any) -> None:
        self.total, self.n, self.disable = options["total"], options["initial"], False
        self.stood = [self.n]

    def update(self, n: int) -> None:
        self.n += n
        self.stood.append(self.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *args: object) -> None:
        pass


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    found: list[Bar] = []
    monkeypatch.setattr(
        run, "ProgressBar", lambda **options: found.append(Bar(**options)) or found[-1]
    )
    return found


def longest_step(bar: Bar) -> int:
    return max(b - a for a, b in zip(bar.stood, bar.stood[1:], strict=False))


def test_sample_counts_responses(tmp_path: Path, tiny_model_dir: Path, bars: list[Bar]) -> None:
    """6 prompts x 3 responses in one task of each sampler: every finished response is seen."""
    server = FaultServer(lambda before, request: None)
    try:
        samplers = {"a": local(tiny_model_dir), "b": remote(server.url)}
        inputs = str(write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(6)))
        given = config(tmp_path, tiny_model_dir, samplers, inputs=inputs, prompts_per_task=6)
        run_sample(given, WorkerSettings())
    finally:
        server.close()
    own = [bar for bar in bars if bar.total == 18]
    assert len(own) == 2
    assert [bar.stood for bar in own] == [list(range(19))] * 2


def test_reference_counts_groups(tmp_path: Path, tiny_model_dir: Path, bars: list[Bar]) -> None:
    """24 groups in one file and one row group: the bar moves with each micro-batch of 60 tokens,
    which holds a few groups.
    """
    options = {"groups_per_shard": 24, "rows_per_row_group": 24}
    unscored_dataset(tmp_path, tiny_model_dir, 24, **options)
    score(tmp_path, tiny_model_dir, show_progress=True, max_tokens_per_micro_batch=60)
    (bar,) = bars
    assert bar.stood[-1] == bar.total == 24
    assert longest_step(bar) < 8
    assert len(bar.stood) > 5


def test_reward_counts_groups(tmp_path: Path, bars: list[Bar]) -> None:
    """8 groups in one row group under two scorers: each has half of a group's share, and the bar
    counts whole groups.
    """
    path = functions(tmp_path)
    scorers = {
        "long": {"kind": "function", "function": f"{path}:length"},
        "right": {"kind": "exact", "column": "answer"},
    }
    root = answered_dataset(tmp_path / "data", n_groups=8, groups_per_shard=8, rows_per_row_group=8)
    reward(root, scorers, {"show_progress": True})
    assert bars[-1].stood == list(range(9))
