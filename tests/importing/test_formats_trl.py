"""`import --format trl`, on files that TRL wrote (tests/data/make_trl_completions.py).

Two prompts with four responses each a step; steps 1 and 2 log one batch. The run's weights were 1
for `digits` and 0.5 for `short`, which does not apply to prompts about cats; `length` is a number
that a reward function logged besides.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import fragments, refused

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Group
from gvpo_offline.importing.formats.shared.trainer_logs import check_advantages
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns
from gvpo_offline.tokenizer import load_tokenizer

TRL = Path(__file__).parents[1] / "data" / "trl"
WEIGHTS = {"digits": 1.0, "short": 0.5}


def completions(run: str, step: int) -> Path:
    return TRL / run / "completions" / f"completions_{step:05d}.parquet"


def rows_of(run: str, step: int) -> list[dict[str, Any]]:
    return pq.read_table(completions(run, step)).to_pylist()


def write_table(path: Path, rows: list[dict[str, Any]], step: int = 1) -> Path:
    """Rows under the schema that TRL wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pq.read_schema(completions("text", 1)).remove_metadata()
    pq.write_table(pa.Table.from_pylist([{**row, "step": step} for row in rows], schema), path)
    return path


@pytest.mark.parametrize("run", ["text", "chat"])
def test_a_run(run: str, tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Two batches, so four groups of four: step 2 repeats step 1, and its 8 rows are counted.

    The empty response of step 3 stands for itself: the model did end at once.
    """
    result = import_log(
        config(
            TRL / run / "completions" / "*.parquet",
            tmp_path / "out",
            format="trl",
            reward_weights=WEIGHTS,
            empty_responses="keep",
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        )
    )
    assert result.counts["rows"] == result.counts["responses"] == 16
    assert result.counts["dropped_repeated_responses"] == 8
    assert "8 responses were dropped: repeated from an earlier step" in "\n".join(result.lines())
    groups = read_groups(tmp_path / "out")
    assert [group.group_size for group in groups] == [4, 4, 4, 4]
    expected = {}
    for step in (1, 3):
        for row in rows_of(run, step):
            text = row["completion"] if run == "text" else row["completion"][0]["content"]
            cat = "cat" in str(row["prompt"])
            expected[text, step] = row["digits"] + (0.0 if cat else 0.5 * row["short"])
    got = {}
    for group in groups:
        assert len(set(group.samplers)) == 1
        step = int(group.samplers[0].removeprefix(f"{run}@"))
        assert group.group_id.startswith(f"{run}/{step}/")
        assert (group.messages is not None) == (run == "chat")
        assert group.responses is not None
        assert group.rewards is not None
        got |= {(t, step): r for t, r in zip(group.responses, group.rewards.tolist(), strict=True)}
    assert got == expected
    (step_of_lineage,) = result.manifest.lineage
    assert [entry["run"] for entry in step_of_lineage.inputs] == [run] * 3


def test_parts_are_kept() -> None:
    """A missing part is None and adds nothing: 3 digits alone are 3."""
    found, _ = fragments(completions("text", 1), "trl", reward_weights=WEIGHTS)
    first, last = found[0], found[-1]
    assert (first.prompt, first.responses) == ("say cat twice", ["9?bmqiwnvay87w"])
    assert (first.rewards, first.components) == ([3.0], {"digits": [3.0], "short": [None]})
    assert (last.rewards, last.components) == ([4.0], {"digits": [4.0], "short": [0.0]})
    assert (last.row, last.samplers) == (7, ["text@1"])


def test_advantages_tell_that_the_sum_is_not_the_reward(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """Without weights all three float columns would count; the advantages do not follow."""
    error = refused(
        completions("text", 1),
        "trl",
        DataError,
        "Set reward_weights to the weights",
        tmp_path / "o",
        tokenizer_name_or_path=str(tiny_tokenizer_dir),
    )
    assert error.row == 0
    assert "digits, short, length were weighted or normalised, or are not all rewards" in str(error)


def test_a_single_reward_needs_no_weights(tmp_path: Path) -> None:
    """With the other columns gone, the advantages of the prompt about cats follow from digits."""
    table = pq.read_table(completions("text", 1)).drop_columns(["short", "length"])
    path = tmp_path / "run" / "completions" / "completions_00001.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(table.slice(0, 4), path)
    found, _ = fragments(path, "trl")
    assert [fragment.rewards for fragment in found] == [[3.0], [2.0], [3.0], [4.0]]
    assert found[0].samplers == ["run@1"]


def test_a_prompt_that_stands_twice_in_a_batch(tmp_path: Path) -> None:
    """Each of its groups was centred by itself; together they lie on no line."""
    rows = [
        {"prompt": prompt, "completion": str(i), "reward": reward, "advantage": advantage}
        for i, (prompt, reward, advantage) in enumerate(
            [
                *(("p", 1.0, 0.7), ("p", 0.0, -0.7)),
                *(("q", 1.0, 0.0), ("q", 1.0, 0.0)),
                *(("p", 1.0, -0.7), ("p", 9.0, 0.7)),
            ]
        )
    ]
    path = tmp_path / "log.parquet"
    pq.write_table(pa.Table.from_pylist([{"step": 1, **row} for row in rows]), path)
    found, _ = fragments(path, "trl")
    assert len({fragment.group_id for fragment in found}) == 2


def test_sampler_setting_and_kept_columns(tmp_path: Path) -> None:
    found, _ = fragments(
        completions("text", 1),
        "trl",
        reward_weights=WEIGHTS,
        sampler="actor",
        columns=Columns(keep=["first"]),
    )
    assert found[0].samplers == [None]  # which stands for the setting
    assert found[0].metadata == '{"first": "9"}'


def test_response_that_no_function_scored(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """None of all functions is no reward and not 0: refused, or dropped and counted."""
    rows = rows_of("text", 1)
    rows[5] = {**rows[5], "digits": None, "short": math.nan}
    path = write_table(tmp_path / "run" / "completions" / "completions_00001.parquet", rows)
    settings = {"reward_weights": WEIGHTS, "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    error = refused(path, "trl", DataError, "each response has one", tmp_path / "o", **settings)
    assert error.row == 5
    result = import_log(
        config(path, tmp_path / "out", format="trl", missing_rewards="drop", **settings)
    )
    assert result.counts["dropped_unrewarded_responses"] == 1
    assert result.counts["responses"] == 7


@pytest.mark.parametrize(
    ("weights", "match"),
    [({"digit": 1.0}, "received digit"), ({"digits": 1.0, "advantage": 1.0}, "received advantage")],
)
def test_unknown_weights(weights: dict[str, float], match: str, tmp_path: Path) -> None:
    refused(
        completions("text", 1), "trl", ConfigError, match, tmp_path / "o", reward_weights=weights
    )


def test_what_is_no_log_of_trl(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"step": 1, "prompt": "p", "completion": "c"}])
    refused(jsonl, "trl", ConfigError, "Set reward_weights to the reward columns", tmp_path / "o")
    bare = tmp_path / "bare.parquet"
    pq.write_table(pa.table({"step": [1], "prompt": ["p"], "completion": ["c"]}), bare)
    refused(bare, "trl", DataError, "one column of floating-point numbers", tmp_path / "o")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"prompt": ["p"], "reward": [1.0]}), other)
    error = refused(other, "trl", DataError, "no step, completion among", tmp_path / "o")
    assert error.row == 0
    refused(
        completions("text", 1), "trl", ConfigError, "only columns.keep is set", tmp_path / "o",
        columns=Columns(prompt="q"),
    )  # fmt: skip


def test_what_a_tool_said_is_read_and_not_scored(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """GRPOTrainer logs completions of agents as messages: assistant, tool, assistant."""
    rows = rows_of("chat", 1)
    tool = {"role": "tool", "content": "16 - 9"}
    rows[2]["completion"] = [*rows[2]["completion"], tool, {"role": "assistant", "content": "7"}]
    path = tmp_path / "tools.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    import_log(
        config(
            path,
            tmp_path / "out",
            format="trl",
            reward_weights=WEIGHTS,
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        )
    )
    (group,) = (g for g in read_groups(tmp_path / "out") if g.response_messages is not None)
    index = next(i for i, messages in enumerate(group.response_messages or ()) if messages)
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    assert group.loss_mask is not None
    mask, ids = group.loss_mask[index], group.response_token_ids[index]
    first = rows[2]["completion"][0]["content"]
    assert tokenizer.decode(ids[mask]) == f"{first}<eos>7<eos>"
    # The template's line end behind <eos>, the tool's turn, and the next generation prompt.
    assert tokenizer.decode(ids[~mask]) == "\n<|tool|>\n16 - 9<eos>\n<|assistant|>\n"


def group_of(groups: list[Group], text: str) -> Group:
    return next(g for g in groups if g.responses is not None and text in g.responses)


def test_same_prompt_at_two_steps_and_in_two_runs(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Another step's or run's responses are another group, even at the same step."""
    rows = rows_of("text", 1)[:4]
    other = [{**row, "completion": row["completion"] + "!"} for row in rows]
    again = [{**row, "completion": row["completion"] + "?"} for row in rows]
    inputs = [
        write_table(tmp_path / "a" / "completions" / "completions_00001.parquet", rows, 1),
        write_table(tmp_path / "a" / "completions" / "completions_00002.parquet", other, 2),
        write_table(tmp_path / "b" / "completions" / "completions_00001.parquet", again, 1),
    ]
    settings = {"reward_weights": WEIGHTS, "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    import_log(config(inputs, tmp_path / "out", format="trl", **settings))
    groups = read_groups(tmp_path / "out")
    assert sorted({s for group in groups for s in group.samplers}) == ["a@1", "a@2", "b@1"]
    assert [len(set(group.samplers)) for group in groups] == [1, 1, 1]
    assert group_of(groups, "9?bmqiwnvay87w").samplers[0] == "a@1"


def test_another_run_folder_is_another_import(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """The run's name is in ids and samplers, so a renamed folder is not the same import."""
    rows = rows_of("text", 1)
    first = write_table(tmp_path / "a" / "completions" / "c.parquet", rows)
    second = write_table(tmp_path / "b" / "completions" / "c.parquet", rows)
    settings = {"reward_weights": WEIGHTS, "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    import_log(config(first, tmp_path / "out", format="trl", **settings))
    assert import_log(config(first, tmp_path / "out", format="trl", **settings)).already_imported
    with pytest.raises(DataError, match="holds this import"):
        import_log(config(second, tmp_path / "out", format="trl", **settings))


finite = st.floats(-100, 100).map(lambda x: round(x, 2))


@given(st.lists(finite, min_size=2, max_size=8), st.floats(0.01, 10), finite)
def test_any_rising_line_of_the_rewards_is_their_advantage(
    rewards: list[float], slope: float, shift: float
) -> None:
    """However a trainer centred and scaled them; one that falls is another reward's."""
    made = np.asarray(rewards)
    check_advantages(rewards, (slope * made + shift).tolist(), ["r"])
    if np.ptp(made) > 1:
        with pytest.raises(DataError, match="Set reward_weights"):
            check_advantages(rewards, (-slope * made).tolist(), ["r"])
