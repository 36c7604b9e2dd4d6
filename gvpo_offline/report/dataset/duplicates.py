"""Exact duplicates: by hashes of token ids, over all groups of a frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gvpo_offline.group import BoolArray
from gvpo_offline.hashing import UInt64Array
from gvpo_offline.report.dataset.frame import ResponseNumbers


@dataclass(frozen=True)
class DuplicateFacts:
    """Exact duplicates: responses and prompts of equal token ids.

    Attributes:
        prompts: different prompts.
        groups_sharing: groups whose prompt another group has too.
        most_groups: groups of the most frequent prompt.
        repeated: responses that repeat an earlier one of their group.
        groups_repeating: groups with such a response.
        groups_of_one: groups whose responses are all equal.
        repeated_other_rewards: of the repeating groups, those where equal responses have different
            rewards.
        across: responses that stand under several prompts.
        across_texts: how many different ones these are.
        most_across: prompts of the response that stands under most of them.
        groups_twice: groups that repeat another one: same prompt and same responses.
    """

    prompts: int
    groups_sharing: int
    most_groups: int
    repeated: int
    groups_repeating: int
    groups_of_one: int
    repeated_other_rewards: int
    across: int
    across_texts: int
    most_across: int
    groups_twice: int


def duplicate_facts(frame: ResponseNumbers) -> DuplicateFacts:
    """Count the exact duplicates of a frame."""
    _, sizes = np.unique(frame.prompt_keys, return_counts=True)
    repeats, order, new = _repeats(frame)
    per_group = frame.sums(repeats)
    texts = _texts_by_prompt(frame)
    _, prompts_of_text = np.unique(texts, return_counts=True)
    wide = prompts_of_text > 1
    in_several = np.isin(frame.keys, np.unique(texts)[wide])
    return DuplicateFacts(
        prompts=len(sizes),
        groups_sharing=int(sizes[sizes > 1].sum()),
        most_groups=int(sizes.max(initial=0)),
        repeated=int(repeats.sum()),
        groups_repeating=int((per_group > 0).sum()),
        groups_of_one=int(((per_group == frame.sizes - 1) & (frame.sizes > 1)).sum()),
        repeated_other_rewards=_other_rewards(frame, order, new),
        across=int(in_several.sum()),
        across_texts=int(wide.sum()),
        most_across=int(prompts_of_text.max(initial=0)),
        groups_twice=_groups_twice(frame),
    )


def repeats_in_group(keys: UInt64Array, group: np.ndarray) -> BoolArray:
    """(N,) whether a response repeats an earlier one of its group; `group`: (N,) its group."""
    order = np.lexsort((keys, group))
    repeats = np.zeros(len(keys), np.bool_)
    same = (keys[order][1:] == keys[order][:-1]) & (group[order][1:] == group[order][:-1])
    repeats[order[1:][same]] = True
    return repeats


def _repeats(frame: ResponseNumbers) -> tuple[BoolArray, np.ndarray, BoolArray]:
    """`repeats_in_group`; the responses sorted by group and key; and where a new key begins."""
    group = frame.group
    order = np.lexsort((frame.keys, group))
    keys, groups = frame.keys[order], group[order]
    new = np.ones(len(keys), np.bool_)
    new[1:] = (keys[1:] != keys[:-1]) | (groups[1:] != groups[:-1])
    repeats = np.zeros(len(keys), np.bool_)
    repeats[order[~new]] = True
    return repeats, order, new


def _other_rewards(frame: ResponseNumbers, order: np.ndarray, new: BoolArray) -> int:
    if frame.rewards is None or not len(order):
        return 0
    rewards = frame.rewards[order]
    first = np.flatnonzero(new)
    differ = np.maximum.reduceat(rewards, first) > np.minimum.reduceat(rewards, first)
    return len(np.unique(frame.group[order][first[differ]]))


def _texts_by_prompt(frame: ResponseNumbers) -> UInt64Array:
    """The key of each response, once for each prompt that it stands under; ascending."""
    prompts = np.repeat(frame.prompt_keys, frame.sizes)
    order = np.lexsort((prompts, frame.keys))
    keys, under = frame.keys[order], prompts[order]
    new = np.ones(len(keys), np.bool_)
    new[1:] = (keys[1:] != keys[:-1]) | (under[1:] != under[:-1])
    return np.asarray(keys[new])


def _groups_twice(frame: ResponseNumbers) -> int:
    """Groups that repeat an earlier one, whatever the order of their responses."""
    if not frame.n_groups:
        return 0
    with np.errstate(over="ignore"):
        whole = np.add.reduceat(frame.keys * np.uint64(0x9E3779B97F4A7C15), frame.starts)
    rows = np.stack([frame.prompt_keys, whole, frame.sizes.astype(np.uint64)], 1)
    return frame.n_groups - len(np.unique(rows, axis=0))


@dataclass(frozen=True)
class HeldOutFacts:
    """Prompts that also stand in another dataset.

    Attributes:
        path: of the other dataset.
        prompts: different prompts there.
        common: how many of them this dataset has.
        groups: groups of this dataset with such a prompt.
        same_tokenizer: whether both datasets name the same tokenizer; None: one does not say. With
            another one no prompt has the same ids.
    """

    path: str
    prompts: int
    common: int
    groups: int
    same_tokenizer: bool | None


def held_out_facts(
    frame: ResponseNumbers, path: str, keys: UInt64Array, same_tokenizer: bool | None
) -> HeldOutFacts:
    """Compare the prompts of a frame with those of another dataset; `keys`: unique, ascending."""
    both = np.isin(frame.prompt_keys, keys)
    return HeldOutFacts(
        path, len(keys), len(np.unique(frame.prompt_keys[both])), int(both.sum()), same_tokenizer
    )


def samplers_of(frame: ResponseNumbers, flags: BoolArray) -> Sequence[tuple[str, int]]:
    """Samplers of the flagged responses with their number, most first."""
    counts = np.bincount(frame.sampler[flags], minlength=len(frame.samplers))
    named = [(frame.samplers[i], int(n)) for i, n in enumerate(counts) if n]
    return sorted(named, key=lambda each: (-each[1], each[0]))
