"""Reference log-probs that no model can have given are refused, wherever they come from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import build_dataset, make_groups, training_table

from gvpo_offline.errors import DataError
from gvpo_offline.findings.gate import check_dataset
from gvpo_offline.merging.settings import MergeConfig
from gvpo_offline.merging.stages import merge
from gvpo_offline.rules import LOGPROB_ROUNDING, impossible_logprobs
from gvpo_offline.store.adopt import adopt_parquet
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.survey import survey

NEED = ("rewards", "ref_seq_logprobs")
# Of a response whose length is set below: 0.1 nats above 0 is 100 tokens' worth of rounding.
IMPOSSIBLE = [0.1, 1e300, -1e300, -1e9]


@pytest.mark.parametrize("value", [*IMPOSSIBLE, math.nan, math.inf, -math.inf])
def test_a_file_of_another_program_is_refused(tmp_path: Path, value: float) -> None:
    groups = make_groups(6)
    logprobs = groups[4].ref_seq_logprobs
    assert logprobs is not None
    wrong = np.array([*logprobs[:-1], value])
    groups[4] = replace(groups[4], ref_seq_logprobs=wrong)
    assert groups[4].response_lengths[-1] < 100
    path = tmp_path / "foreign.parquet"
    pq.write_table(training_table(groups), path)
    with pytest.raises(DataError, match="reference log-prob is") as caught:
        adopt_parquet([path], need=NEED)
    assert (caught.value.row, caught.value.group) == (4, groups[4].group_id)
    assert caught.value.file == str(path)


def test_rounding_is_no_error(tmp_path: Path) -> None:
    """A certain response of T tokens may come out at up to 0.001 T."""
    groups = make_groups(4)
    lengths = np.array(groups[1].response_lengths)
    groups[1] = replace(groups[1], ref_seq_logprobs=0.99 * LOGPROB_ROUNDING * lengths)
    groups[2] = replace(groups[2], ref_seq_logprobs=np.zeros(groups[2].group_size))
    pq.write_table(training_table(groups), tmp_path / "foreign.parquet")
    assert adopt_parquet([tmp_path / "foreign.parquet"], need=NEED).n_groups == 4


@given(
    st.lists(st.floats(-8000, 8000, width=32), min_size=2, max_size=30),
    st.integers(0, 29),
    st.integers(1, 50),
)
def test_no_log_softmax_in_float32_is_refused(logits: list[float], index: int, n: int) -> None:
    """The largest error: log-sum-exp and difference, each rounded to float32."""
    x = np.array(logits, np.float32)
    top = x.max()
    total = np.float32(top + np.log(np.exp(x - top, dtype=np.float32).sum(dtype=np.float32)))
    logprob = float(np.float32(x[index % len(x)] - total))
    values, lengths = np.array([n * logprob]), np.array([n])
    assert not impossible_logprobs(values, lengths).any()


@pytest.mark.parametrize("value", IMPOSSIBLE)
def test_a_dataset_with_one_is_not_merged_or_valid_and_training_is_told(
    tmp_path: Path, value: float
) -> None:
    groups = make_groups(12)
    logprobs = groups[9].ref_seq_logprobs
    assert logprobs is not None
    groups[9] = replace(groups[9], ref_seq_logprobs=np.array([value, *logprobs[1:]]))
    root = tmp_path / "data"
    build_dataset(root, groups=groups)
    build_dataset(tmp_path / "more", 4, seed=1)
    with pytest.raises(DataError, match="reference log-prob is") as caught:
        merge(MergeConfig(dataset=str(root), add=str(tmp_path / "more"), show_progress=False))
    assert caught.value.group == groups[9].group_id
    # The full checks find first that such a value is not the sum of its tokens' log-probs.
    found = [f for f in check_dataset(root, light=True).findings if f.severity == "error"]
    assert [(f.rule, f.count) for f in found] == [("positive-logprobs", 1)]
    assert found[0].examples[0].group == groups[9].group_id
    # Shards of 8, row groups of 4: group 9 is row 1 of the third row group. Training refuses it.
    assert survey(open_dataset(root)).first_impossible == (2, 1, groups[9].group_id)
    other = survey(open_dataset(tmp_path / "more"))
    assert other.first_impossible is None
    assert (other + survey(open_dataset(root))).first_impossible == (2, 1, groups[9].group_id)
