"""Open-Assistant's exports: trees of messages, with the users' ranking of replies.

A row is a tree, or one message of it, as in the data sets of the Hub; the messages of a tree then
follow each other. The assistant's replies to one message of a prompter are a group; the prompt is
the path from the root of the tree to that message.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.fragment import Fragment, with_location
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record, Row

Node = Mapping[str, Any]

_TREE = "message_tree_id"
_FLAT = (
    *("message_id", "parent_id", "text", "role", "deleted", "rank", "model_name", "labels"),
    "tree_state",
)

_RANK = "rank"
# The labels that people give a message, from 0 to 1.
_LABELS = (
    *("spam", "fails_task", "lang_mismatch", "pii", "not_appropriate", "hate_speech"),
    *("sexual_content", "moral_judgement", "political_content"),
    *("quality", "toxicity", "humor", "helpfulness", "creativity", "violence"),
)
_PAIRS = ("name", "value")
_ROLES = {"prompter": "user", "assistant": "assistant"}


def open_format(config: ImportConfig) -> OpenAssistantFormat:
    """Several groups per row; the reward is the share of the other replies that a reply ranks
    before. Its parts are this (`rank`) and the labels, whose weights are 0 by default."""
    return OpenAssistantFormat(config)


class OpenAssistantFormat(RowFormat):
    """Reads the rows of tree exports."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(
            config,
            required=(_TREE, "prompt"),
            optional=_FLAT,
            parse=self._groups,
            parts={_RANK: 1.0, **dict.fromkeys(_LABELS, 0.0)},
        )
        self._deleted = 0
        self._weighted = [name for name, weight in config.reward_weights.items() if weight]

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """The fragments of each tree; see `LogFormat.read`."""
        yield from super().read(_trees(rows, source), source)

    def finish(self) -> Mapping[str, int]:
        """The number of replies that are deleted, or follow a deleted message."""
        return {**super().finish(), "dropped_deleted_responses": self._deleted}

    def _groups(self, record: Record) -> list[Fragment]:
        root = values.struct(record["prompt"], "the prompt of a tree")
        if _role(root) != "user":
            raise DataError(
                "a tree begins with a message of role prompter", received=repr(root.get("role"))
            )
        found: list[Fragment] = []
        pending: list[tuple[list[dict[str, Any]], Node]] = [([], root)]
        while pending:
            before, node = pending.pop()
            if node.get("deleted"):
                self._deleted += sum(_role(below) == "assistant" for below in _subtree(node))
                continue
            path = [*before, {"role": _role(node), "content": _text(node)}]
            replies = _replies(node)
            for reply in replies:
                if _role(reply) == path[-1]["role"]:
                    raise DataError(
                        "the messages of a tree are by prompter and assistant in turn",
                        received=f"a {reply.get('role')} who answers a {node.get('role')}",
                        remedy="remove the tree",
                    )
            kept = [reply for reply in replies if not reply.get("deleted")]
            if path[-1]["role"] == "user" and kept:
                found.append(self._group(path, node, kept))
            pending += [(path, reply) for reply in reversed(replies)]
        return found

    def _group(self, path: list[dict[str, Any]], asked: Node, replies: list[Node]) -> Fragment:
        labels = [_labels(reply) for reply in replies]
        named = {name: None for found in labels for name in found}
        parts = {name: [found.get(name) for found in labels] for name in (*named, *self._weighted)}
        return text_fragment(
            conversations.prompt(path),
            [_text(reply) for reply in replies],
            samplers=[values.sampler(reply.get("model_name")) for reply in replies],
            parts={**parts, _RANK: _shares(replies)},
            group_id=values.identifier(asked.get("message_id")),
            response_ids=[values.identifier(reply.get("message_id")) for reply in replies],
        )


def _trees(rows: Iterable[Row], source: InputInfo) -> Iterator[Row]:
    """Rows of trees: those of the input, or each joined from the rows of its messages."""
    seen: set[str] = set()

    def tree_of(row: Row) -> tuple[bool, str]:
        return "prompt" in row[1] or "message_id" not in row[1], str(row[1].get(_TREE))

    for (whole, name), group in itertools.groupby(rows, key=tree_of):
        if whole:
            yield from group
            continue
        messages = list(group)
        try:
            if name in seen:
                raise DataError(
                    "the messages of a tree follow each other",
                    received=f"further messages of the tree {name}",
                    remedy=f"sort the log by {_TREE}",
                )
            seen.add(name)
            yield messages[0][0], _joined([dict(record) for _, record in messages])
        except DataError as error:
            number, record = messages[0]
            source.refuse(with_location(error, file=source.label, row=number), record)


def _joined(messages: list[dict[str, Any]]) -> Record:
    """A tree from its messages.

    Raises:
        DataError: a message has no parent among them, or several have none.
    """
    by_id = {
        values.identifier(message.get("message_id")): message | {"replies": []}
        for message in messages
    }
    roots = [message for message in by_id.values() if message.get("parent_id") is None]
    for message in by_id.values():
        parent = message.get("parent_id")
        parent = None if parent is None else values.identifier(parent)
        if parent is not None and parent not in by_id:
            raise DataError(
                "a tree has all of its messages",
                received=f"no message {parent}, whose reply is {message['message_id']}",
                remedy="import the whole export; or remove the tree",
            )
        if parent is not None:
            by_id[parent]["replies"].append(message)
    reached = len(list(_subtree(roots[0]))) if len(roots) == 1 else 0
    if len(roots) != 1 or len(by_id) != len(messages) or reached != len(messages):
        raise DataError(
            "a tree has one message without a parent, each message once, and each below that one",
            received=f"{len(roots)} without a parent, {len(messages)} messages, {len(by_id)} ids, "
            f"{reached} below the first",
            remedy="remove the tree",
        )
    return {**roots[0], "prompt": roots[0]}


def _replies(node: Node) -> list[Node]:
    return [*values.structs(node.get("replies") or [], "the replies to a message")]


def _subtree(node: Node) -> Iterator[Node]:
    pending = [node]
    while pending:
        found = pending.pop()
        yield found
        pending += _replies(found)


def _role(node: Node) -> str:
    role = _ROLES.get(str(node.get("role")))
    if role is None:
        raise DataError(
            f"a message has a role: {', '.join(_ROLES)}", received=repr(node.get("role"))
        )
    return role


def _text(node: Node) -> str:
    text = node.get("text")
    if not isinstance(text, str):
        raise DataError(
            "a message has a text",
            received=f"{text!r} in message {node.get('message_id')!r}",
            remedy="remove the tree",
        )
    return values.valid_text(text)


def _shares(replies: list[Node]) -> list[float | None]:
    """For each reply, the share of the other ranked replies that it ranks before."""
    ranks = [values.number(reply.get(_RANK), "a rank") for reply in replies]
    shares = values.share_beaten(np.array(ranks, np.float64))  # None becomes NaN
    return [None if math.isnan(share) else share for share in shares.tolist()]


def _labels(reply: Node) -> dict[str, float | None]:
    """The mean values of a reply's labels that are known here."""
    labels = values.struct(reply.get("labels"), "the labels of a message")
    if "name" in labels:  # columns have lists of names and values
        names, means = (values.entries(labels.get(n), f"the {n}s of labels") for n in _PAIRS)
        if len(names) != len(means) or not all(isinstance(name, str) for name in names):
            raise DataError(
                "labels have one value for each name",
                received=f"the names {names!r} and {len(means)} values",
            )
        given = dict(zip(names, means, strict=True))
    else:
        given = {
            name: values.struct(label, f"the label {name}").get("value")
            for name, label in labels.items()
            if label is not None
        }
    return {name: values.number(given[name], name) for name in _LABELS if name in given}
