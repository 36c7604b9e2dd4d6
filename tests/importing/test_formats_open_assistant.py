"""`import --format open_assistant`: message trees.

The rows have the shape of model/model_eval/manual/data/en_100_tree.jsonl in the repository
LAION-AI/Open-Assistant at f1e6ed9526f5817531f3ab85441a40b3671ddccb, and labels as
oasst-data/oasst_data/schemas.py there defines them; texts and numbers are made up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import fragments, refused

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.importer import import_log


def node(name: str, role: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "message_id": name, "text": f"text {name}", "role": role, "lang": "en", "review_count": 3,
        "review_result": True, "deleted": False, "synthetic": False, "replies": list(replies),
        **more,
    }  # fmt: skip


def said(name: str, rank: int | None, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    ranked = {} if rank is None else {"rank": rank}
    return node(name, "assistant", *replies, **ranked, **more)


def asked(name: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return node(name, "prompter", *replies, **more)


def tree(root: dict[str, Any]) -> dict[str, Any]:
    return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}


def labels(quality: float) -> dict[str, Any]:
    return {"quality": {"value": quality, "count": 3}, "spam": {"value": 0.0, "count": 3}}


def test_replies_to_one_message_are_a_group(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Three ranked replies; of the two replies deeper in the tree, one has a label only. Ranks
    0, 1, 2 beat 2/2, 1/2 and 0/2 of the others."""
    deeper = asked("p2", said("c", 1, labels=labels(0.25)), said("d", 0, labels=labels(0.75)))
    rows = [tree(asked("p", said("x", 1, model_name="chip"), said("y", 0, deeper), said("z", 2)))]
    path = write_jsonl(tmp_path / "trees.jsonl", rows)
    settings = {"format": "open_assistant", "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    import_log(config(path, tmp_path / "out", **settings))
    first, second = sorted(read_groups(tmp_path / "out"), key=lambda group: -group.group_size)
    assert (first.group_id, first.response_ids) == ("p", ("x", "y", "z"))
    assert json.loads(first.messages or "") == [{"role": "user", "content": "text p"}]
    assert first.responses == ("text x", "text y", "text z")
    assert first.rewards is not None
    assert first.rewards.tolist() == [0.5, 1.0, 0.0]
    assert first.samplers == ("chip", "trees", "trees")
    assert (second.group_id, second.response_ids) == ("p2", ("c", "d"))
    assert json.loads(second.messages or "") == [
        {"role": "user", "content": "text p"},
        {"role": "assistant", "content": "text y"},
        {"role": "user", "content": "text p2"},
    ]
    assert second.rewards is not None
    assert second.rewards.tolist() == [0.0, 1.0]


def test_labels_are_parts_of_the_reward(tmp_path: Path) -> None:
    replies = said("x", 0, labels=labels(0.25)), said("y", 1, labels=labels(1.0)), said("z", 2)
    path = write_jsonl(tmp_path / "trees.jsonl", [tree(asked("p", *replies))])
    ((made,), _) = fragments(path, "open_assistant")
    assert made.rewards == [1.0, 0.5, 0.0]
    assert made.components == {
        "rank": [1.0, 0.5, 0.0],
        "quality": [0.25, 1.0, None],
        "spam": [0.0, 0.0, None],
    }
    weights = {"rank": 1.0, "quality": 2.0}
    ((made,), _) = fragments(path, "open_assistant", reward_weights=weights)
    assert made.rewards == [1.5, 2.5, 0.0]
    ((made,), _) = fragments(path, "open_assistant", reward_weights={"humor": 1.0})
    assert made.rewards == [None, None, None]


def test_deleted_messages_and_what_follows_them_are_left_out(tmp_path: Path) -> None:
    """The answers of a deleted message were given to a text that is not there: 2 are dropped below
    `x`, and `x` itself. A deleted reply takes no part in the ranking of the others."""
    lost = asked("p2", said("a", 0), said("b", 1))
    rows = [tree(asked("p", said("x", 0, lost, deleted=True), said("y", 1), said("z", 2)))]
    found, counts = fragments(write_jsonl(tmp_path / "trees.jsonl", rows), "open_assistant")
    assert [(f.group_id, f.response_ids, f.rewards) for f in found] == [
        ("p", ["y", "z"], [1.0, 0.0])
    ]
    assert counts["dropped_deleted_responses"] == 3


def test_replies_without_a_rank_have_no_reward(tmp_path: Path) -> None:
    rows = [tree(asked("p", said("x", 0), said("y", 1), said("z", None)))]
    ((made,), _) = fragments(write_jsonl(tmp_path / "trees.jsonl", rows), "open_assistant")
    assert made.rewards == [1.0, 0.0, None]
    path = write_jsonl(tmp_path / "one.jsonl", [tree(asked("p", said("x", 0)))])
    ((made,), _) = fragments(path, "open_assistant")
    assert made.rewards == [None]


def messages_of(root: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    """A tree as the data sets of the Hub have it: a row per message, labels in columns. The
    features are those of the card of OpenAssistant/oasst1."""
    own = {key: value for key, value in root.items() if key != "replies"}
    given = root.get("labels") or {}
    own |= {
        "parent_id": parent,
        "message_tree_id": "p",
        "rank": root.get("rank"),
        "model_name": root.get("model_name"),
        "labels": {
            "name": list(given),
            "value": [label["value"] for label in given.values()],
            "count": [label["count"] for label in given.values()],
        },
    }
    below = [messages_of(reply, root["message_id"]) for reply in root["replies"]]
    return [own, *(row for rows in below for row in rows)]


DEEP = asked(
    "p",
    said("x", 1, labels=labels(0.5)),
    said("y", 0, asked("q", said("a", 1), said("b", 0)), labels=labels(0.25)),
)


def test_rows_of_messages_are_joined_to_trees(tmp_path: Path) -> None:
    rows = messages_of(DEEP)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "flat.parquet")
    whole, _ = fragments(write_jsonl(tmp_path / "trees.jsonl", [tree(DEEP)]), "open_assistant")
    for path in (write_jsonl(tmp_path / "flat.jsonl", rows), tmp_path / "flat.parquet"):
        assert fragments(path, "open_assistant")[0] == whole
    assert [f.group_id for f in whole] == ["p", "q"]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (messages_of(DEEP)[:3] + messages_of(DEEP)[4:5], "no message q, whose reply is a"),
        (messages_of(DEEP)[1:2], "no message p, whose reply is x"),
        (messages_of(DEEP)[:1] * 2, "2 messages, 1 ids"),
    ],
)
def test_incomplete_trees(
    rows: list[Any], match: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    path = write_jsonl(tmp_path / "flat.jsonl", rows)
    settings = {"tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    refused(path, "open_assistant", DataError, match, tmp_path / "o", **settings)


def test_the_messages_of_a_tree_follow_each_other(tmp_path: Path) -> None:
    other = [{**row, "message_tree_id": "o"} for row in messages_of(asked("o", said("z", 0)))]
    rows = [*messages_of(DEEP)[:2], *other, *messages_of(DEEP)[2:]]
    path = write_jsonl(tmp_path / "flat.jsonl", rows)
    with pytest.raises(DataError, match="further messages of the tree p"):
        fragments(path, "open_assistant")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (tree(said("x", 0)), "a tree begins with a message of role prompter"),
        (tree(asked("p", asked("q"))), "a prompter who answers a prompter"),
        (tree(asked("p", node("q", "judge"))), "a message has a role: prompter, assistant"),
        (tree(asked("p", said("x", 0, text=None))), "None in message 'x'"),
        (tree(asked("p", node("x", "assistant", rank="first"))), "a rank is a number"),
        ({"id": "p", "text": "a"}, "no message_tree_id, prompt among"),
    ],
)
def test_refused_trees(
    row: dict[str, Any], match: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    path = write_jsonl(tmp_path / "trees.jsonl", [row])
    settings = {"tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    assert refused(path, "open_assistant", DataError, match, tmp_path / "o", **settings).row == 0


def test_unknown_labels_cannot_be_weighted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "trees.jsonl", [tree(asked("p"))])
    weights = {"beauty": 1.0}
    match = "received beauty"
    refused(path, "open_assistant", ConfigError, match, tmp_path / "o", reward_weights=weights)
