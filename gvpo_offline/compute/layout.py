"""How groups lie in the model's input: arithmetic on token ids, without torch.

`packed` puts whole groups into one row, each prompt once, responses as a tree below it where they
begin alike; `padded` gives each response a row of its own, prompt repeated; `continued` gives each
group a prompt row and, below it, padded rows of its responses. In all of them a response is without
its last token, which predicts nothing, and each token of a response has one row of the model's
output that predicts it: `Targets` says which.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gvpo_offline.compute.settings import LayoutName
from gvpo_offline.compute.tree import Int64Array, Tree
from gvpo_offline.group import Group

TokenIds = NDArray[np.int32]

# Below this a shared beginning of responses costs more as a segment of its own than it saves.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Targets:
    """Which output row predicts which token: each distinct (row, token) is a pair, scored once.

    Attributes:
        hidden_rows_H: (H,) rows of the output that predict something, ascending.
        pair_rows_N: (N,) index into `hidden_rows_H`.
        pair_tokens_N: (N,) the token predicted there.
        token_pairs_M: (M,) for every scored response token, response by response, its pair.
        lengths_R: (R,) scored tokens of each response.
        counts_M: (M,) bool, whether the token counts in its response's sum.
    """

    hidden_rows_H: Int64Array
    pair_rows_N: Int64Array
    pair_tokens_N: Int64Array
    token_pairs_M: Int64Array
    lengths_R: Int64Array
    counts_M: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PackedInput:
    """One row of T tokens.

    Attributes:
        input_ids: (1, T) int64.
        position_ids: (1, T) int64, each token's position in its own sequence.
        tree: the row's segments.
    """

    input_ids: Int64Array
    position_ids: Int64Array
    tree: Tree


@dataclass(frozen=True, eq=False)
class PaddedInput:
    """R right-padded rows of L tokens: (R, L) int64 ids, and a mask that is 1 where a token is."""

    input_ids: Int64Array
    attention_mask: Int64Array


class PromptAndRows(NamedTuple):
    """A group: its prompt (P,), its responses right-padded (k, L), their lengths (k,)."""

    prompt_ids: Int64Array
    response_ids: Int64Array
    lengths: Int64Array

    @property
    def width(self) -> int:
        """Output rows of each response: one less than the longest has tokens."""
        return int(self.response_ids.shape[1]) - 1


@dataclass(frozen=True, eq=False)
class ContinuedInput:
    """Prompts and their responses, group by group: P output rows, then k x (L - 1), for each."""

    groups: tuple[PromptAndRows, ...]


Input = PackedInput | PaddedInput | ContinuedInput


@dataclass(frozen=True, eq=False)
class Layout:
    """What the model reads, and where in its output every response token is predicted."""

    input: Input
    targets: Targets

    @property
    def n_tokens(self) -> int:
        """Tokens that pass through the model, padding included."""
        if isinstance(self.input, ContinuedInput):
            return sum(
                len(group.prompt_ids) + len(group.lengths) * group.width
                for group in self.input.groups
            )
        return self.input.input_ids.size


def packed(
    groups: Sequence[Group],
    *,
    share: bool = True,
    counted_only: bool = False,
    min_shared_tokens: int = MIN_SHARED_TOKENS,
    prompt_apart: bool = False,
) -> Layout:
    """Whole groups in one row.

    Args:
        groups: at least one.
        share: each prompt once, with its responses in a tree; false: prompt and response as one
            sequence, prompt repeated.
        counted_only: leave out targets that do not count.
        min_shared_tokens: responses of a group share what they begin with from so many tokens on;
            equal responses are computed once however short they are.
        prompt_apart: the prompt is a segment of its own even where all responses begin alike.
    """
    builder = _RowBuilder()
    predicting: list[Int64Array] = []
    for group in groups:
        if share:
            predicting += builder.add_tree(group, min_shared_tokens, prompt_apart)
        else:
            predicting += [builder.add_chain(group, ids) for ids in group.response_token_ids]
    return Layout(builder.build(), _targets(groups, predicting, counted_only))


def padded(groups: Sequence[Group], *, counted_only: bool = False) -> Layout:
    """One right-padded row per response."""
    rows = [
        np.concatenate([group.prompt_token_ids, ids[:-1]])
        for group in groups
        for ids in group.response_token_ids
    ]
    input_ids = _right_padded(rows)
    width = input_ids.shape[1]
    lengths = np.array([len(row) for row in rows])
    predicting: list[Int64Array] = []
    for group in groups:
        for ids in group.response_token_ids:
            first = len(predicting) * width + len(group.prompt_token_ids) - 1
            predicting.append(np.arange(first, first + len(ids)))
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    return Layout(PaddedInput(input_ids, mask), _targets(groups, predicting, counted_only))


def continued(groups: Sequence[Group], *, counted_only: bool = False) -> Layout:
    """Each group's prompt alone, then its responses as right-padded rows."""
    parts: list[PromptAndRows] = []
    predicting: list[Int64Array] = []
    offset = 0
    for group in groups:
        lengths = np.array(group.response_lengths)
        ids = _right_padded(group.response_token_ids)
        part = PromptAndRows(group.prompt_token_ids.astype(np.int64), ids, lengths)
        parts.append(part)
        prompt_end = offset + len(part.prompt_ids)
        for number, length in enumerate(lengths):
            first = prompt_end + number * part.width
            own = np.arange(first, first + length - 1)
            predicting.append(np.concatenate([[prompt_end - 1], own]))
        offset = prompt_end + len(lengths) * part.width
    return Layout(ContinuedInput(tuple(parts)), _targets(groups, predicting, counted_only))


def below_prompt(group: Group, *, counted_only: bool = False) -> Layout:
    """A packed row of one group without the prompt, whose keys and values are there already.

    Rows of the output still count from the prompt's first token; the prompt's last is needed too.
    """
    whole = packed([group], counted_only=counted_only, prompt_apart=True)
    given = whole.input
    assert isinstance(given, PackedInput)
    prefix = len(group.prompt_token_ids)
    tree = replace(given.tree, prefix=prefix)
    below = PackedInput(given.input_ids[:, prefix:], given.position_ids[:, prefix:], tree)
    return Layout(below, whole.targets)


class _RowBuilder:
    """Segments of a row as they come, in pre-order."""

    def __init__(self) -> None:
        self._tokens: list[TokenIds] = []
        self._depths: list[int] = []
        self._parents: list[int] = []
        self._starts: list[int] = []
        self._n_rows = 0

    def add_chain(self, group: Group, response: TokenIds) -> Int64Array:
        """A sequence of its own; returns the rows that predict the response's tokens."""
        tokens = np.concatenate([group.prompt_token_ids, response[:-1]])
        start = self._starts[self._add(tokens, 0, -1)]
        return np.arange(start + len(group.prompt_token_ids) - 1, start + len(tokens))

    def add_tree(self, group: Group, min_shared: int, prompt_apart: bool) -> list[Int64Array]:
        """A group as a tree; returns for each response the rows that predict its tokens."""
        prompt = group.prompt_token_ids
        responses, which = _sorted_unique(group.response_token_ids)
        shared = _shared_beginnings(responses)
        last = len(responses)
        common = int(shared[1:].min()) if last > 1 else len(responses[0]) - 1
        if prompt_apart:
            common = 0
        root = self._add(np.concatenate([prompt, responses[0][:common]]), 0, -1)
        leaf_of = [root] * last
        # (first response, last + 1, tokens of them already placed, segment they hang below); the
        # top of the stack is the next in pre-order.
        stack = [(0, last, common, root)]
        while stack:
            low, high, placed, parent = stack.pop()
            if high - low == 1:
                body = responses[low][placed:-1]
                leaf = self._add(body, len(prompt) + placed, parent) if len(body) else parent
                leaf_of[low] = leaf
                continue
            common = int(shared[low + 1 : high].min())
            below = parent
            if common - placed >= min_shared:
                tokens = responses[low][placed:common]
                below, placed = self._add(tokens, len(prompt) + placed, parent), common
            stack += [(*part, placed, below) for part in _parts(shared, low, high, common)]
        rows = [self._rows_down_to(leaf) for leaf in leaf_of]
        first = len(prompt) - 1
        return [rows[i][first : first + len(responses[i])] for i in which]

    def build(self) -> PackedInput:
        lengths = np.array([len(tokens) for tokens in self._tokens], dtype=np.int64)
        starts = np.array(self._starts, dtype=np.int64)
        stops = starts + lengths
        ends = stops.copy()
        parents = np.array(self._parents, dtype=np.int64)
        for segment in range(len(ends) - 1, -1, -1):
            if parents[segment] >= 0:
                ends[parents[segment]] = max(ends[parents[segment]], ends[segment])
        tree = Tree(starts, stops, ends, np.array(self._depths, dtype=np.int64), parents)
        ids = np.concatenate(self._tokens).astype(np.int64)
        return PackedInput(ids[None], tree.row_depths[None], tree)

    def _add(self, tokens: TokenIds, depth: int, parent: int) -> int:
        self._starts.append(self._n_rows)
        self._tokens.append(tokens)
        self._depths.append(depth)
        self._parents.append(parent)
        self._n_rows += len(tokens)
        return len(self._starts) - 1

    def _rows_down_to(self, segment: int) -> Int64Array:
        parts = []
        while segment >= 0:
            start = self._starts[segment]
            parts.append(np.arange(start, start + len(self._tokens[segment])))
            segment = self._parents[segment]
        return np.concatenate(parts[::-1])


def _sorted_unique(responses: Sequence[TokenIds]) -> tuple[list[TokenIds], list[int]]:
    """The distinct responses in lexicographic order, and for each response its place there."""
    # Big-endian bytes of non-negative numbers sort as the numbers do.
    keys = [ids.astype(">u4").tobytes() for ids in responses]
    place = {key: number for number, key in enumerate(sorted(set(keys)))}
    unique: list[TokenIds] = [responses[0]] * len(place)
    for key, ids in zip(keys, responses, strict=True):
        unique[place[key]] = ids
    return unique, [place[key] for key in keys]


def _shared_beginnings(responses: Sequence[TokenIds]) -> Int64Array:
    """(n,) tokens that each response begins with alike its predecessor; 0 for the first."""
    shared = np.zeros(len(responses), dtype=np.int64)
    for number in range(1, len(responses)):
        before, after = responses[number - 1], responses[number]
        length = min(len(before), len(after))
        differ = np.flatnonzero(before[:length] != after[:length])
        shared[number] = differ[0] if len(differ) else length
    return shared


def _parts(shared: Int64Array, low: int, high: int, common: int) -> list[tuple[int, int]]:
    """Responses [low, high), which share `common` tokens, cut where they share no more; reversed,
    to be put on a stack.
    """
    if high - low == 1:
        return [(low, high)]
    cuts = [low, *(low + 1 + np.flatnonzero(shared[low + 1 : high] == common)).tolist(), high]
    return list(itertools.pairwise(cuts))[::-1]


def _targets(
    groups: Sequence[Group], predicting: Sequence[Int64Array], counted_only: bool
) -> Targets:
    tokens = [ids for group in groups for ids in group.response_token_ids]
    counts = [
        np.ones(len(ids), dtype=bool) if group.loss_mask is None else group.loss_mask[number]
        for group in groups
        for number, ids in enumerate(group.response_token_ids)
    ]
    if counted_only:
        tokens = [ids[mask] for ids, mask in zip(tokens, counts, strict=True)]
        predicting = [rows[mask] for rows, mask in zip(predicting, counts, strict=True)]
        counts = [mask[mask] for mask in counts]
    rows_M = np.concatenate(predicting)
    tokens_M = np.concatenate(tokens).astype(np.int64)
    pairs_N, token_pairs_M = np.unique(rows_M << 32 | tokens_M, return_inverse=True)
    hidden_rows_H, pair_rows_N = np.unique(pairs_N >> 32, return_inverse=True)
    return Targets(
        hidden_rows_H=hidden_rows_H,
        pair_rows_N=pair_rows_N.astype(np.int64),
        pair_tokens_N=pairs_N & 0xFFFFFFFF,
        token_pairs_M=token_pairs_M.astype(np.int64),
        lengths_R=np.array([len(ids) for ids in tokens], dtype=np.int64),
        counts_M=np.concatenate(counts),
    )


def _right_padded(rows: Sequence[TokenIds]) -> Int64Array:
    width = max(len(row) for row in rows)
    padded_rows = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        padded_rows[number, : len(row)] = row
    return padded_rows


def lay_out(groups: Sequence[Group], name: LayoutName, *, counted_only: bool = False) -> Layout:
    """Groups in the layout of a name; none at all: something to compute of which nothing counts.

    Args:
        groups: any number.
        name: which layout.
        counted_only: leave out targets that do not count.
    """
    groups = groups or [_NOTHING]
    if name == "continued":
        return continued(groups, counted_only=counted_only)
    if name == "padded":
        return padded(groups, counted_only=counted_only)
    return packed(groups, share=name == "shared", counted_only=counted_only)


_NOTHING = Group(
    group_id="",
    prompt_token_ids=np.zeros(1, dtype=np.int32),
    response_token_ids=(np.zeros(2, dtype=np.int32),),
    samplers=("",),
    truncated=(False,),
)
