"""Near-duplicates on a sample of groups, by MinHash and locality-sensitive hashing.

A text of token ids is its set of runs of three ids. Two texts are near-duplicates if the Jaccard
index of their sets is at least 0.8 and they are not equal. Candidates come from MinHash with LSH
(A. Broder 1997; P. Indyk and R. Motwani 1998), by the package datasketch; the Jaccard index of each
candidate is then computed from the sets, so that what is reported is a near-duplicate. LSH misses
some pairs just above the threshold.

What the prompts of a dataset share, such as a chat template and a system prompt, says nothing about
duplicates: runs of ids that occur in more than a tenth of the prompts are left out.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gvpo_offline.hashing import splitmix64

RUN, THRESHOLD = 3, 0.8
_PERMUTATIONS = 64
_MOST_CANDIDATES = 50  # of one text that are compared exactly
_COMMON, _AT_LEAST = 0.1, 10
PACKAGE, INSTALL = "datasketch", "pip install 'gvpo_offline[report]'"
TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class SampledGroup:
    """A group whose texts are compared.

    Attributes:
        key: row group and row.
        group_id: its id.
        prompt: (P,) ids.
        responses: k arrays of (T_i,) ids.
    """

    key: tuple[int, int]
    group_id: str
    prompt: TokenIds
    responses: Sequence[TokenIds]


@dataclass(frozen=True)
class NearFacts:
    """Near-duplicates among some groups.

    Attributes:
        groups, responses, prompts: how many were compared; prompts and responses that are equal to
            another one of the sample count once.
        in_group: responses with a near-duplicate in their own group.
        groups_with: groups with such a response.
        across: responses with a near-duplicate under another prompt.
        near_prompts: prompts with a near-duplicate among the other prompts.
        examples: pairs of group ids with near-duplicate prompts.
        keys: (row group, row) of the groups with near-duplicate responses.
        prompt_keys: (row group, row) of groups with a near-duplicate prompt.
        missing: how to install the package that is needed; "" if it was there.
    """

    groups: int
    responses: int
    prompts: int
    in_group: int = 0
    groups_with: int = 0
    across: int = 0
    near_prompts: int = 0
    examples: Sequence[tuple[str, str]] = ()
    keys: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    prompt_keys: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    missing: str = ""


def near_facts(groups: Sequence[SampledGroup]) -> NearFacts:
    """Compare the prompts of some groups with each other, and their responses."""
    responses = {
        (number, ids.tobytes()): ids
        for number, group in enumerate(groups)
        for ids in group.responses
    }
    prompts: dict[bytes, int] = {}
    for number, group in enumerate(groups):
        prompts.setdefault(group.prompt.tobytes(), number)
    counts = (len(groups), len(responses), len(prompts))
    if importlib.util.find_spec(PACKAGE) is None:
        return NearFacts(*counts, missing=INSTALL)
    owners = [number for number, _ in responses]
    prompt_of = [groups[number].prompt.tobytes() for number in owners]
    texts = [content for _, content in responses]
    in_group: set[int] = set()
    across: set[int] = set()
    for one, other in _near_pairs([runs_of(ids) for ids in responses.values()]):
        if owners[one] == owners[other]:
            in_group |= {one, other}
        elif prompt_of[one] != prompt_of[other] and texts[one] != texts[other]:
            across |= {one, other}
    firsts = list(prompts.values())
    pairs = list(_near_pairs(_without_common([runs_of(groups[n].prompt) for n in firsts])))
    near = {firsts[number] for pair in pairs for number in pair}
    return NearFacts(
        *counts,
        in_group=len(in_group),
        groups_with=len({owners[number] for number in in_group}),
        across=len(across),
        near_prompts=len(near),
        examples=[(groups[firsts[a]].group_id, groups[firsts[b]].group_id) for a, b in pairs[:5]],
        keys=frozenset(groups[owners[number]].key for number in in_group),
        prompt_keys=frozenset(groups[number].key for number in near),
    )


def runs_of(ids: TokenIds) -> npt.NDArray[np.uint64]:
    """The set of runs of three ids of a text, hashed: unique and ascending, (m,) uint64.

    A text of fewer ids is one run.
    """
    found = np.asarray(ids, np.uint64) + np.uint64(1)
    if len(found) < RUN:
        found = np.concatenate([found, np.zeros(RUN - len(found), np.uint64)])
    hashes = np.zeros(len(found) - RUN + 1, np.uint64)
    for offset in range(RUN):
        hashes = splitmix64(hashes ^ found[offset : offset + len(hashes)])
    return np.unique(hashes)


def jaccard(one: npt.NDArray[np.uint64], other: npt.NDArray[np.uint64]) -> float:
    """The Jaccard index of two sets, each unique and ascending: |A and B| / |A or B|."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def _without_common(sets: Sequence[npt.NDArray[np.uint64]]) -> list[npt.NDArray[np.uint64]]:
    """The sets without what is in more than a tenth of them (of few: in more than half)."""
    n = len(sets)
    most = max(_COMMON * n, min(_AT_LEAST, n / 2))
    if not n:
        return []
    values, counts = np.unique(np.concatenate(list(sets)), return_counts=True)
    common = values[counts > most]
    return [np.setdiff1d(each, common, assume_unique=True) for each in sets]


def _near_pairs(sets: Sequence[npt.NDArray[np.uint64]]) -> list[tuple[int, int]]:
    """Pairs of sets, the lower index first, with a Jaccard index of at least THRESHOLD."""
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(threshold=THRESHOLD, num_perm=_PERMUTATIONS)
    blank = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)
    found: list[tuple[int, int]] = []
    compared: Counter[int] = Counter()
    for number, own in enumerate(sets):
        if not len(own):
            continue
        sketch = blank.copy()
        sketch.update_batch((own & np.uint64(0xFFFFFFFF)).tolist())
        for other in sorted(lsh.query(sketch)):
            if compared[other] >= _MOST_CANDIDATES or compared[number] >= _MOST_CANDIDATES:
                continue
            compared.update((other, number))
            if jaccard(own, sets[other]) >= THRESHOLD:
                found.append((other, number))
        lsh.insert(number, sketch)
    return found
