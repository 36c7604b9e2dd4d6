"""Layouts of groups: the context of each predicting row, the scored tokens, the token cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import group_of, grown_group, sequences

from gvpo_offline.compute.layout import (
    MIN_SHARED_TOKENS,
    ContinuedInput,
    Layout,
    PackedInput,
    PaddedInput,
    continued,
    lay_out,
    packed,
    padded,
    without_prompt,
)
from gvpo_offline.compute.settings import LayoutName
from gvpo_offline.compute.tree import AttentionRule, visible
from gvpo_offline.group import Group
from gvpo_offline.stream.plan import shape_of

GROUPS = st.lists(grown_group(), min_size=1, max_size=3)


class Scored(NamedTuple):
    """A scored token: the context of its row, the token, whether it counts."""

    context: tuple[int, ...]
    token: int
    counts: bool


def contexts(layout: Layout) -> dict[int, tuple[int, ...]]:
    """For every output row with an input token: the visible tokens, the row's own token last."""
    given_input = layout.input
    found: dict[int, tuple[int, ...]] = {}
    if isinstance(given_input, PackedInput):
        ids, seen = given_input.input_ids[0], visible(given_input.tree, AttentionRule())
        assert given_input.position_ids.shape == given_input.input_ids.shape
        for row, own in enumerate(seen):
            # Visible rows have positions 0, 1, 2 …, as in an ordinary sequence.
            assert given_input.position_ids[0, own].tolist() == list(range(own.sum()))
            found[row] = tuple(ids[own].tolist())
    elif isinstance(given_input, PaddedInput):
        width = given_input.input_ids.shape[1]
        for number, (ids, mask) in enumerate(
            zip(given_input.input_ids, given_input.attention_mask, strict=True)
        ):
            length = int(mask.sum())
            assert mask.tolist() == [1] * length + [0] * (width - length)
            found |= {number * width + i: tuple(ids[: i + 1].tolist()) for i in range(length)}
    else:
        offset = 0
        for prompt, responses, lengths in given_input.groups:
            found |= {offset + i: tuple(prompt[: i + 1].tolist()) for i in range(len(prompt))}
            offset += len(prompt)
            for ids, length in zip(responses, lengths, strict=True):
                tokens = (*prompt.tolist(), *ids.tolist())
                reads = range(length - 1)
                found |= {offset + i: tokens[: len(prompt) + i + 1] for i in reads}
                offset += responses.shape[1] - 1
    return found


def scored(layout: Layout) -> list[list[Scored]]:
    """The scored tokens of a layout, response by response."""
    targets, before = layout.targets, contexts(layout)
    rows = targets.hidden_rows_H[targets.pair_rows_N[targets.token_pairs_M]].tolist()
    tokens = targets.pair_tokens_N[targets.token_pairs_M].tolist()
    each = zip(rows, tokens, targets.counts_M.tolist(), strict=True)
    flat = [Scored(before[row], token, counts) for row, token, counts in each]
    stops = np.cumsum(targets.lengths_R).tolist()
    return [flat[a:b] for a, b in zip([0, *stops], stops, strict=False)]


def wanted(groups: Sequence[Group], *, counted_only: bool = False) -> list[list[Scored]]:
    """The expected scored tokens: prompt and response so far, then the next response token."""
    found = []
    for prompt, ids, mask in sequences(groups):
        row = (*prompt.tolist(), *ids.tolist())
        tokens = [
            Scored(row[: len(prompt) + i], row[len(prompt) + i], bool(mask[i]))
            for i in range(len(ids))
        ]
        found.append([token for token in tokens if token.counts or not counted_only])
    return found


def trie_size(groups: Sequence[Group]) -> int:
    """Number of distinct prefixes of the input sequences per group: a lower bound for layouts."""
    nodes = set()
    for number, group in enumerate(groups):
        for prompt, ids, _ in sequences([group]):
            row = (*prompt.tolist(), *ids.tolist())
            nodes |= {(number, *row[:n]) for n in range(1, len(row))}
    return len(nodes)


@settings(max_examples=150, deadline=None)
@given(groups=GROUPS, min_shared=st.integers(1, 6), apart=st.booleans(), counted_only=st.booleans())
def test_shared_rows_see_their_prompt_and_response_so_far(
    groups: list[Group], min_shared: int, apart: bool, counted_only: bool
) -> None:
    layout = packed(
        groups, min_shared_tokens=min_shared, prompt_apart=apart, counted_only=counted_only
    )
    assert scored(layout) == wanted(groups, counted_only=counted_only)


@settings(max_examples=100, deadline=None)
@given(groups=GROUPS, name=st.sampled_from(["shared", "packed", "continued", "padded"]))
def test_every_layout_scores_the_same(groups: list[Group], name: LayoutName) -> None:
    assert scored(lay_out(groups, name)) == wanted(groups)
    counted = lay_out(groups, name, counted_only=True)
    assert scored(counted) == wanted(groups, counted_only=True)
    # Tokens that do not count are still part of the input.
    assert counted.n_tokens == lay_out(groups, name).n_tokens


@settings(max_examples=100, deadline=None)
@given(groups=GROUPS)
def test_each_pair_of_a_row_and_a_token_is_scored_once(groups: list[Group]) -> None:
    targets = packed(groups, min_shared_tokens=1).targets
    pairs = list(zip(targets.pair_rows_N.tolist(), targets.pair_tokens_N.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert set(targets.token_pairs_M.tolist()) == set(range(len(pairs)))
    assert (np.diff(targets.hidden_rows_H) > 0).all()
    assert set(targets.pair_rows_N.tolist()) == set(range(len(targets.hidden_rows_H)))
    # At most one pair per distinct (prompt, response so far, next token) of a group.
    meanings = {
        (number, *token[:2])
        for number, group in enumerate(groups)
        for response in wanted([group])
        for token in response
    }
    assert len(pairs) == len(meanings)


@settings(max_examples=150, deadline=None)
@given(groups=GROUPS)
def test_no_token_is_read_twice_where_everything_is_shared(groups: list[Group]) -> None:
    assert packed(groups, min_shared_tokens=1).n_tokens == trie_size(groups)


@settings(max_examples=100, deadline=None)
@given(groups=GROUPS, min_shared=st.integers(1, 30))
def test_what_is_shared_decides_between_two_bounds(groups: list[Group], min_shared: int) -> None:
    n_tokens = packed(groups, min_shared_tokens=min_shared).n_tokens
    alone = sum(shape_of(group).tokens("shared") for group in groups)
    assert trie_size(groups) <= n_tokens <= alone


@settings(max_examples=50, deadline=None)
@given(group=grown_group(), times=st.integers(2, 4))
def test_duplicates_cost_nothing(group: Group, times: int) -> None:
    again = replace(group, response_token_ids=group.response_token_ids * times, loss_mask=None)
    once = packed([replace(group, loss_mask=None)])
    layout = packed([again])
    assert layout.n_tokens == once.n_tokens
    assert len(layout.targets.pair_rows_N) == len(once.targets.pair_rows_N)
    assert scored(layout) == wanted([again])


@settings(max_examples=50, deadline=None)
@given(groups=GROUPS)
def test_plans_know_what_a_layout_costs(groups: list[Group]) -> None:
    # A shared row may cost less than planned, if responses share prefixes.
    shapes = [shape_of(group) for group in groups]
    names: tuple[LayoutName, ...] = ("packed", "continued")
    for name in names:
        cost = sum(shape.tokens(name) for shape in shapes)
        assert lay_out(groups, name).n_tokens == cost
    for group, shape in zip(groups, shapes, strict=True):
        assert lay_out([group], "padded").n_tokens == shape.tokens("padded")
        assert lay_out([group], "shared").n_tokens <= shape.tokens("shared")


def below_as_whole(group: Group, layout: Layout) -> Layout:
    """A row without its prompt, with the prompt's tokens inserted again."""
    row = layout.input
    assert isinstance(row, PackedInput)
    n_prompt = len(group.prompt_token_ids)
    ids = np.concatenate([group.prompt_token_ids, row.input_ids[0]])[None].astype(np.int64)
    positions = np.concatenate([np.arange(n_prompt), row.position_ids[0]])[None]
    return Layout(PackedInput(ids, positions, replace(row.tree, prefix=0)), layout.targets)


@settings(max_examples=100, deadline=None)
@given(group=grown_group(), counted_only=st.booleans())
def test_below_a_prompt_is_the_same_row_without_it(group: Group, counted_only: bool) -> None:
    layout = without_prompt(group, counted_only=counted_only)
    assert isinstance(layout.input, PackedInput)
    tree, n_prompt = layout.input.tree, len(group.prompt_token_ids)
    assert tree.prefix == n_prompt == tree.stops[0]
    assert layout.n_tokens == tree.n_rows - n_prompt
    assert layout.targets.hidden_rows_H[0] >= n_prompt - 1
    whole = below_as_whole(group, layout)
    assert scored(whole) == wanted([group], counted_only=counted_only)


def example() -> Group:
    """Prompt 1 2 3; the first two responses diverge after 4 5, the third equals the first."""
    return group_of([1, 2, 3], [[4, 5, 6, 7], [4, 5, 8, 9, 9], [4, 5, 6, 7], [9]])


def test_an_example_by_hand_shared() -> None:
    layout = packed([example()], min_shared_tokens=2)
    row, targets = layout.input, layout.targets
    assert isinstance(row, PackedInput)
    # prompt | 4 5 | 6 | 8 9: each response without its last token; the duplicate and the response
    # of one token add no input.
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 8, 9]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 5, 6]]
    # The prompt's last row, 2, predicts 4 and 9; then 3 -> 5, 4 -> 6 and 8, 5 -> 7, 6 -> 9,
    # 7 -> 9. Rows 0 and 1 predict nothing.
    assert targets.hidden_rows_H.tolist() == [2, 3, 4, 5, 6, 7]
    assert targets.pair_rows_N.tolist() == [0, 0, 1, 2, 2, 3, 4, 5]
    assert targets.pair_tokens_N.tolist() == [4, 9, 5, 6, 8, 7, 9, 9]
    assert targets.lengths_R.tolist() == [4, 5, 4, 1]
    # 4 5 6 7 | 4 5 8 9 9 | 4 5 6 7 | 9, as places in the list of pairs.
    assert targets.token_pairs_M.tolist() == [0, 2, 3, 5, 0, 2, 4, 6, 7, 0, 2, 3, 5, 1]
    assert targets.counts_M.all()


def test_an_example_by_hand_in_the_other_layouts() -> None:
    # The shared prefix of 2 tokens is shorter than 3, so each distinct response repeats it:
    # 3 + (4 - 1) + (5 - 1) tokens.
    assert packed([example()], min_shared_tokens=3).n_tokens == 10
    # One prompt per response: (3 + 3) + (3 + 4) + (3 + 3) + 3.
    assert packed([example()], share=False).n_tokens == 22
    # Four rows as wide as the longest, 3 + 4.
    assert padded([example()]).n_tokens == 28
    # The prompt, then four rows of 5 - 1.
    given_input = continued([example()]).input
    assert isinstance(given_input, ContinuedInput)
    assert continued([example()]).n_tokens == 3 + 16
    assert given_input.groups[0].response_ids.shape == (4, 5)
    assert given_input.groups[0].lengths.tolist() == [4, 5, 4, 1]


def test_where_all_responses_begin_alike_the_prompt_goes_on() -> None:
    group = group_of([1, 2], [[5, 6, 7], [5, 6, 8]])
    joined, apart = (packed([group], prompt_apart=flag).input for flag in (False, True))
    assert isinstance(joined, PackedInput)
    assert isinstance(apart, PackedInput)
    # 1 2 5 6 in one segment: no leaf has another input token. With a separate prompt segment, 5 6
    # is a shared prefix, but shorter than the minimum.
    assert joined.input_ids.tolist() == [[1, 2, 5, 6]]
    assert joined.tree.stops.tolist() == [4]
    assert apart.input_ids.tolist() == [[1, 2, 5, 6, 5, 6]]
    assert apart.tree.stops.tolist() == [2, 4, 6]


@pytest.mark.parametrize("shared", [MIN_SHARED_TOKENS - 1, MIN_SHARED_TOKENS])
def test_beginnings_are_shared_from_a_length_on(shared: int) -> None:
    begin = list(range(10, 10 + shared))
    # A third response begins differently, so that the prompt's segment ends with the prompt.
    group = group_of([1, 2], [[*begin, 5, 6], [*begin, 7, 8, 9], [3, 3]])
    # 2 + (shared + 1) + (shared + 2) + 1, minus the shared tokens.
    saved = shared if shared >= MIN_SHARED_TOKENS else 0
    assert packed([group]).n_tokens == 2 + (shared + 1) + (shared + 2) + 1 - saved


def test_a_response_that_ends_within_another_adds_nothing() -> None:
    group = group_of([1], [[4, 5, 6, 7], [4, 5]])
    layout = packed([group], min_shared_tokens=1)
    assert layout.n_tokens == 1 + 3
    assert scored(layout) == wanted([group])


def test_masked_tokens_are_context_and_no_targets() -> None:
    group = group_of([1], [[4, 5, 6], [7, 8]], [[True, False, True], [False, True]])
    layout = packed([group], counted_only=True)
    # The input is 1 | 4 5 | 7; of 4 5 6 and 7 8 the tokens 4, 6 and 8 are targets.
    assert layout.n_tokens == 4
    assert scored(layout) == [
        [Scored((1,), 4, True), Scored((1, 4, 5), 6, True)],
        [Scored((1, 7), 8, True)],
    ]
    assert packed([group]).targets.counts_M.tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("name", ["shared", "packed", "continued", "padded"])
def test_nothing_is_laid_out_as_something(name: LayoutName) -> None:
    layout = lay_out([], name)
    assert layout.targets.lengths_R.tolist() == [2]
