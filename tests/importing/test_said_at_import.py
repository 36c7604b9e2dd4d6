"""What an import says about its log: repetitions, what was dropped by sampler, long responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.importing import ID_COLUMNS, config, id_rows, read_groups, write_jsonl

from gvpo_offline.group import BoolArray, Int32Array
from gvpo_offline.importing import map_reduce, tally
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns
from gvpo_offline.importing.tally import Tally, merged, sampler_lines
from gvpo_offline.store.manifest import load_manifest

IDS = {"columns": Columns(**ID_COLUMNS)}


def group_rows(
    group: str, prompt: list[int], responses: list[list[int]], sampler: str = "s"
) -> list[dict[str, Any]]:
    return [
        {"group": group, "prompt_ids": prompt, "response_ids": ids, "reward": 1.0 * i}
        | {"sampler": sampler}
        for i, ids in enumerate(responses)
    ]


# --- repetitions ----------------------------------------------------------------------------------


def test_identical_responses_and_groups(tmp_path: Path) -> None:
    """a, b and e have one prompt and one set of responses: two groups repeat the first of them.

    b has 5 6 twice more than once (2 repetitions), d has 5 twice (1): 3 repeated responses. c has
    another prompt, d another set.
    """
    rows = [
        *group_rows("a", [1, 2], [[5, 6], [7]]),
        *group_rows("b", [1, 2], [[7], [5, 6], [5, 6], [5, 6]]),
        *group_rows("c", [1, 3], [[5, 6], [7]]),
        *group_rows("d", [1, 2], [[5], [6, 7], [5]]),
        *group_rows("e", [1, 2], [[7], [5, 6]]),
    ]
    result = import_log(config(write_jsonl(tmp_path / "log.jsonl", rows), tmp_path / "out", **IDS))
    assert result.counts["identical_responses"] == 3
    assert result.counts["identical_groups"] == 2
    printed = "\n".join(result.lines())
    assert "  3 responses repeat another response of their group, token for token" in printed
    assert "  2 groups repeat another group: the same prompt and the same responses" in printed
    assert len(read_groups(tmp_path / "out")) == 5  # said, not changed


def test_responses_that_differ_in_their_mask_alone_are_not_identical(tmp_path: Path) -> None:
    rows = [
        {**row, "mask": mask}
        for row, mask in zip(
            group_rows("a", [1], [[5, 6]] * 4), ([1, 0], [0, 1], None, [1, 1]), strict=True
        )
    ]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    columns = Columns(**ID_COLUMNS, loss_mask="mask")
    result = import_log(config(log, tmp_path / "out", columns=columns))
    assert result.counts["identical_responses"] == 1  # no mask, and a mask of only 1


def test_nothing_is_said_of_a_log_without_repetitions(tmp_path: Path) -> None:
    rows = group_rows("a", [1], [[5], [6]]) + group_rows("b", [2], [[5], [6]])
    result = import_log(config(write_jsonl(tmp_path / "log.jsonl", rows), tmp_path / "out", **IDS))
    assert not {"identical_responses", "identical_groups"} & set(result.counts)
    assert result.manifest.lineage[0].details == {}
    # Older versions of the package can read a manifest without the key.
    assert '"details"' not in (tmp_path / "out" / "manifest-000001.json").read_text()


class _Response:
    """A response as the tally sees it."""

    def __init__(self, *ids: int) -> None:
        self.sampler = "s"
        self.reward: float | None = 1.0
        self.ids: Int32Array | None = np.array(ids, np.int32)
        self.mask: BoolArray | None = None
        self.truncated = False


@given(
    groups=st.lists(st.tuples(st.integers(0, 30), st.sets(st.integers(0, 3), min_size=1))),
    tasks=st.integers(1, 4),
)
def test_identical_groups_are_found_across_tasks(
    groups: list[tuple[int, set[int]]], tasks: int
) -> None:
    tallies = [Tally() for _ in range(tasks)]
    for number, (prompt, responses) in enumerate(groups):
        found = [_Response(7, r) for r in sorted(responses, reverse=bool(number % 2))]
        tallies[number % tasks].keep(np.array([prompt], np.int32), found)
    distinct = {(prompt, frozenset(responses)) for prompt, responses in groups}
    _, counts = merged([each.details() for each in tallies])
    assert counts.get("identical_groups", 0) == len(groups) - len(distinct)


def test_a_share_of_the_groups_stands_for_all_of_a_long_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1,024 pairs of identical groups; an eighth of all hashes is kept.

    Each pair is in the share with probability 1/8: 128 pairs, standard deviation
    √(1024 · 1/8 · 7/8) = 10.6. The estimate is 8 times the pairs found, and memory holds both
    groups of each: within 5 deviations, 75 to 181 pairs.
    """
    monkeypatch.setattr(tally, "_EXACT_BYTES", 1000)
    many = Tally(text_bytes=8000)
    for prompt in range(1024):
        for _ in range(2):
            many.keep(np.array([prompt], np.int32), [_Response(5), _Response(6)])
    details, counts = merged([many.details()])
    assert details["identical_groups_counted_on"] == "1/8 of the groups"
    pairs = len(many._contents) // 2
    assert 75 <= pairs <= 181
    assert counts == {"identical_groups": 8 * pairs}


def test_commit_records_of_earlier_versions_have_no_details() -> None:
    assert merged([{}, {}]) == ({}, {})


# --- what was dropped, by sampler -----------------------------------------------------------------


def overlong_rows() -> list[dict[str, Any]]:
    """20 groups with 2 responses each of `long` and `short`; prompts of 2 tokens.

    `long` writes 8 tokens in 15 of the groups (reward 0.75) and 3 in the other 5 (reward 0.5);
    `short` always writes 2 (reward 0.25).
    """
    rows: list[dict[str, Any]] = []
    for g in range(20):
        length, reward = (8, 0.75) if g < 15 else (3, 0.5)
        for sampler, n, r in [("long", length, reward)] * 2 + [("short", 2, 0.25)] * 2:
            ids = [10 + len(rows) % 7, *[20 + g] * (n - 1)]
            rows.append(
                {"group": f"g{g}", "prompt_ids": [1, g + 1], "response_ids": ids, "reward": r}
                | {"sampler": sampler}
            )
    return rows


def test_what_overlong_drops_is_said_by_sampler_with_mean_rewards(tmp_path: Path) -> None:
    """With max_length 6, `long` keeps 10 of 40 responses, and `short` all 40."""
    log = write_jsonl(tmp_path / "log.jsonl", overlong_rows())
    options = {**IDS, "max_length": 6, "overlong": "drop"}
    result = import_log(config(log, tmp_path / "out", **options))
    assert result.counts["dropped_overlong_responses"] == 30
    assert result.details["samplers"] == {
        "dropped_overlong_responses": {
            "long": {"kept": 10, "kept_mean_reward": 0.5, "dropped": 30}
            | {"dropped_mean_reward": 0.75},
            "short": {"kept": 40, "kept_mean_reward": 0.25, "dropped": 0}
            | {"dropped_mean_reward": None},
        }
    }
    lines = result.lines()
    at = lines.index("  30 responses over max_length were dropped")
    warning = (
        "    warning: overlong: drop drops 75% of the responses of long and 0% of those of short: "
        "the dataset no longer compares these samplers as the log does"
    )
    assert lines[at + 1 : at + 4] == [
        "    long: kept 10 of mean reward 0.5, dropped 30 of mean reward 0.75 (75%)",
        "    short: kept 40 of mean reward 0.25, dropped 0 (0%)",
        warning,
    ]
    # It is in the manifest, and the same is said when the import is repeated.
    assert load_manifest(tmp_path / "out").lineage[0].details == result.details
    again = import_log(config(log, tmp_path / "out", **options))
    assert again.already_imported
    assert again.lines()[1:] == lines[1:]


def test_shards_give_the_same_numbers(tmp_path: Path) -> None:
    """Sums over shards; 0.75, 0.5 and 0.25 are exact in any order."""
    log = write_jsonl(tmp_path / "log.jsonl", overlong_rows())
    options = {**IDS, "max_length": 6, "overlong": "drop"}
    one = import_log(config(log, tmp_path / "one", **options))
    many = import_log(
        config(log, tmp_path / "many", shard_bytes=log.stat().st_size // 8, **options)
    )
    assert len(many.manifest.groups) > len(one.manifest.groups) == 1
    assert many.details == one.details
    assert many.counts == one.counts


def test_other_drops_are_said_by_sampler(tmp_path: Path) -> None:
    """Missing rewards and singletons; the mean is over responses with a reward."""
    rows = [
        *group_rows("a", [1], [[5], [6], [7]], "x"),
        *group_rows("b", [2], [[5], [6]], "y"),
        *group_rows("c", [3], [[5]], "y"),
    ]
    rows[1]["reward"] = None
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    result = import_log(
        config(log, tmp_path / "out", missing_rewards="drop", singletons="drop", **IDS)
    )
    x, y = {"kept": 2, "kept_mean_reward": 1.0}, {"kept": 2, "kept_mean_reward": 0.5}
    none = {"dropped": 0, "dropped_mean_reward": None}
    assert result.details["samplers"] == {
        "dropped_singletons": {
            "x": {**x, **none},
            "y": {**y, "dropped": 1, "dropped_mean_reward": 0.0},
        },
        "dropped_unrewarded_responses": {
            "x": {**x, "dropped": 1, "dropped_mean_reward": None},
            "y": {**y, **none},
        },
    }
    # Three responses a sampler are too few for a warning.
    assert not any("warning" in line for line in result.lines())


def test_a_long_list_of_samplers_is_cut() -> None:
    found = {
        f"s{i:02}": {"kept": 100 - i, "kept_mean_reward": None, "dropped": i}
        | {"dropped_mean_reward": None}
        for i in range(13)
    }
    lines = sampler_lines(found, "overlong: drop")
    assert lines[0] == "s12: kept 88, dropped 12 (12%)"
    assert lines[10] == "and 3 more samplers"
    assert lines[11].startswith("warning: overlong: drop drops 12% of the responses of s12 and 0%")
    assert len(lines) == 12


def test_very_many_samplers_are_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the two samplers above: 50 kept of mean (10 · 0.5 + 40 · 0.25) / 50, 30 dropped."""
    monkeypatch.setattr(map_reduce, "MOST_SAMPLERS", 1)
    log = write_jsonl(tmp_path / "log.jsonl", overlong_rows())
    result = import_log(config(log, tmp_path / "out", max_length=6, overlong="drop", **IDS))
    assert result.details["samplers"]["dropped_overlong_responses"] == {
        "all samplers": {"kept": 50, "kept_mean_reward": 0.3, "dropped": 30}
        | {"dropped_mean_reward": 0.75}
    }


# --- length ---------------------------------------------------------------------------------------


def test_responses_beyond_the_tokenizers_limit(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Prompts of 3 tokens under a limit of 7: responses of over 4 tokens are counted."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    assert tally.model_max_length(tokenizer) is None  # the tokenizer states no limit
    tokenizer.model_max_length = 7
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(20))
    lengths = [len(row["response_ids"]) for row in id_rows(20)]
    options = {**IDS, "tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    result = import_log(config(log, tmp_path / "out", **options))
    over = sum(n > 4 for n in lengths)
    assert 0 < over < len(lengths)
    assert result.counts["over_model_max_length_responses"] == over
    assert (
        f"  {over} responses are longer, with their prompt, than the tokenizer's model_max_length "
        "(7)" in result.lines()
    )


def test_groups_whose_rows_differ_in_kept_columns(tmp_path: Path) -> None:
    """Metadata belongs to the group: of 3 groups one has two gold answers, the first is stored."""
    rows = [
        {"prompt_ids": [1, g], "response_ids": [5 + r, 2], "group": f"g{g}", "reward": r}
        | {"sampler": "m", "gold": g + (g == 1) * r}
        for g in range(3)
        for r in range(2)
    ]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    columns = Columns(**{**ID_COLUMNS, "keep": ["gold"]})
    result = import_log(config(log, tmp_path / "out", columns=columns))
    assert result.counts["differing_metadata_groups"] == 1
    line = "  1 groups have rows whose kept columns differ; those of the first row are stored"
    assert line in result.lines()
    stored = {g.group_id: g.metadata for g in read_groups(tmp_path / "out")}
    assert stored == {f"g{g}": f'{{"gold": {g}}}' for g in range(3)}


# --- samplers without a column --------------------------------------------------------------------


def test_samplers_named_by_files_are_said_to_be_so(tmp_path: Path) -> None:
    """And the column that probably names them; not if `sampler` or `columns.sampler` is given."""
    columns = {key: name for key, name in ID_COLUMNS.items() if key != "sampler"}
    rows = [{**row, "model": "old"} for row in id_rows(2)]
    rows = [{key: value for key, value in row.items() if key != "sampler"} for row in rows]
    log = write_jsonl(tmp_path / "monday.jsonl", rows)

    def notes(name: str, *, sampler: str | None = None, **more: Any) -> list[str]:
        own = config(log, tmp_path / name, columns=Columns(**columns, **more), sampler=sampler)
        return [note for note in import_log(own).notes if note.startswith("the samplers are")]

    (note,) = notes("files")
    assert "columns.sampler names the column" in note
    assert note.endswith("; the log has a column 'model'")
    assert load_manifest(tmp_path / "files").samplers.keys() == {"monday"}
    assert notes("column", sampler="model") == []
