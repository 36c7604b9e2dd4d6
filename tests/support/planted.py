"""Small datasets with one fault each, and one without any: what `validate` has to find.

Every fault is planted into the same 120 groups of 4 responses, whose token ids look like those of a
chat template: a prompt ends with the generation prompt (ids 3 and 4), a complete response with the
end token (id 2).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from support.builders import SAMPLERS, reference_family

from gvpo_offline.group import Group
from gvpo_offline.hashing import sha256_text
from gvpo_offline.store.arrow import (
    groups_to_table,
    reference_to_table,
    rewards_to_table,
)
from gvpo_offline.store.import_versions import IMPORT_VERSION_KEY
from gvpo_offline.store.incomplete import write_incomplete
from gvpo_offline.store.manifest import (
    BaseFile,
    IncompleteGroups,
    LineageStep,
    Manifest,
    RewardFamily,
    TokenizerInfo,
    dump_manifest,
    load_manifest,
    manifest_path,
)
from gvpo_offline.store.parquet import write_parquet
from gvpo_offline.store.reference_selection import ReferenceSelection
from gvpo_offline.store.schema import (
    GROUPS_COLUMNS,
    REFERENCE_COLUMNS,
    arrow_schema,
    rewards_schema,
)
from gvpo_offline.store.writer import publish, write_sidecar
from gvpo_offline.version import IMPORT_VERSION

N_GROUPS, K, PER_SHARD, PER_ROW_GROUP = 120, 4, 60, 30
END, ASSISTANT, NEWLINE, FIRST_WORD, VOCAB_SIZE = 2, 3, 4, 5, 100
MODEL = "made-up"
TOKENIZER = TokenizerInfo(name_or_path=MODEL, fingerprint=sha256_text("t"), vocab_size=VOCAB_SIZE)
_VALUES = (0.0, 0.25, 0.5, 1.0)
Logprobs = list[list[np.ndarray[Any, Any]]]


def clean_groups(n_groups: int = N_GROUPS, seed: int = 0) -> list[Group]:
    """Groups without a fault. Rewards are independent of samplers and lengths; 1 response in 40 is
    truncated."""
    rng = np.random.default_rng(seed)
    return [_group(number, rng) for number in range(n_groups)]


def _group(number: int, rng: np.random.Generator) -> Group:
    lengths = rng.integers(6, 15, K)
    responses = [rng.integers(FIRST_WORD, VOCAB_SIZE, n, dtype=np.int32) for n in lengths]
    truncated = [number % 10 == 0 and i == 0 for i in range(K)]
    for ids, cut in zip(responses, truncated, strict=True):
        ids[-1] = ids[-1] if cut else END
    words = rng.integers(FIRST_WORD, VOCAB_SIZE, int(rng.integers(4, 9)), dtype=np.int32)
    rewards = rng.permutation(_VALUES)
    # A truncated response is never the only best one.
    rewards[0] = min(rewards[0], 0.5) if truncated[0] else rewards[0]
    return Group(
        group_id=f"group-{number:05d}",
        prompt_token_ids=np.concatenate([words, [END, ASSISTANT, NEWLINE]]).astype(np.int32),
        response_token_ids=tuple(responses),
        samplers=tuple(SAMPLERS[(number + i) % len(SAMPLERS)] for i in range(K)),
        truncated=tuple(truncated),
        rewards=rewards,
        source="made-up.jsonl",
        messages=json.dumps([{"role": "user", "content": f"question {number}"}]),
        responses=tuple(f"answer {number}.{i}" for i in range(K)),
    )


def clean_logprobs(groups: Sequence[Group], seed: int = 0) -> Logprobs:
    """Reference log-probs per token in nats, on average -1.5."""
    rng = np.random.default_rng(seed)
    return [
        [-rng.exponential(1.5, n).clip(0.01, 5).astype(np.float32) for n in group.response_lengths]
        for group in groups
    ]


def write(
    folder: Path,
    groups: Sequence[Group],
    logprobs: Logprobs | None = None,
    *,
    components: Sequence[np.ndarray[Any, Any]] | None = None,
    scored: Callable[[int], bool] | None = None,
    **manifest: Any,
) -> Path:
    """Write a dataset as the package's writer does, but without its checks of groups.

    Args:
        folder: of the dataset.
        groups: its groups.
        logprobs: of the reference; default: `clean_logprobs`.
        components: (1, k) of each group; default: without.
        scored: whether the reference covers a group, by its number; default: it covers all.
        manifest: fields of the manifest that are replaced; `reference`: fields of the reference.
    """
    logprobs = clean_logprobs(groups) if logprobs is None else logprobs
    of_reference = manifest.pop("reference", {})
    bases, rewards, references = [], [], []
    for shard, start in enumerate(range(0, len(groups), PER_SHARD)):
        part = slice(start, min(start + PER_SHARD, len(groups)))
        spans = [
            slice(a, min(a + PER_ROW_GROUP, part.stop))
            for a in range(part.start, part.stop, PER_ROW_GROUP)
        ]
        tables = (groups_to_table(groups[span]) for span in spans)
        name = f"{shard:05d}"
        entry = write_parquet(folder, "groups", name, arrow_schema(GROUPS_COLUMNS), tables)
        base = BaseFile(
            **entry.model_dump(),
            n_responses=sum(group.group_size for group in groups[part]),
            n_tokens=sum(group.n_tokens for group in groups[part]),
        )
        bases.append(base)
        schema = rewards_schema(components=components is not None)
        own = (_rewards(groups[span], components and components[span]) for span in spans)
        rewards.append(write_sidecar(folder, "rewards/reward", name, base, schema, own))
        scores = (_reference(groups, logprobs, span, scored) for span in spans)
        schema = arrow_schema(REFERENCE_COLUMNS)
        references.append(write_sidecar(folder, "reference/made-up", name, base, schema, scores))
    names = ["part"] if components is not None else []
    content: dict[str, Any] = {
        "tokenizer": TOKENIZER,
        "samplers": {name: {"temperature": 1.0} for name in SAMPLERS},
        "groups": bases,
        "rewards": [RewardFamily(name="reward", files=rewards, components=names)],
        "references": [
            reference_family(
                references, tokenizer_fingerprint=TOKENIZER.fingerprint, **of_reference
            )
        ],
        "lineage": [_import_step()],
    }
    publish(folder, lambda newest: Manifest(**{**content, **manifest}))
    return folder


def _import_step(version: int = IMPORT_VERSION, **config: Any) -> LineageStep:
    config = {"format": "jsonl", **config, IMPORT_VERSION_KEY: version}
    return LineageStep(stage="import", package_version="0", config=config)


def _rewards(groups: Sequence[Group], components: Any) -> Any:
    ids = [group.group_id for group in groups]
    values = [group.rewards for group in groups if group.rewards is not None]
    return rewards_to_table(ids, values, components)


def _reference(
    groups: Sequence[Group],
    logprobs: Logprobs,
    span: slice,
    scored: Callable[[int], bool] | None,
) -> Any:
    sums, tokens = [], []
    for number in range(span.start, span.stop):
        group, own = groups[number], logprobs[number]
        masks = group.loss_mask or [np.ones(len(row), bool) for row in own]
        counted = [np.sum(r[m], dtype=np.float64) for r, m in zip(own, masks, strict=True)]
        covered = scored is None or scored(number)
        sums.append(np.array(counted) if covered else np.full(len(own), np.nan))
        tokens.append(own if covered else [row[:0] for row in own])
    return reference_to_table([group.group_id for group in groups[span]], sums, tokens)


def clean(folder: Path) -> Path:
    """A dataset of which no rule finds anything."""
    return write(folder, clean_groups())


@dataclass(frozen=True)
class Planted:
    """A fault.

    Attributes:
        rule: the rule that finds it.
        build: writes the dataset; returns its folder.
        count: how many units the finding counts.
        example: the group that stands first in its examples; None: it is about the whole dataset.
        light: whether the light checks find it.
    """

    rule: str
    build: Callable[[Path], Path]
    count: int
    example: str | None
    light: bool = True

    def __call__(self, folder: Path) -> Path:
        """Write the dataset to `folder`."""
        return self.build(folder)


PLANTED: dict[str, Planted] = {}
"""Faults by name."""


def _planted(
    rule: str, count: int, example: int | None, *, light: bool = True
) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """Add the decorated builder to PLANTED; `example` is the number of a group."""

    def add(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        name = None if example is None else f"group-{example:05d}"
        PLANTED[build.__name__.replace("_", "-")] = Planted(rule, build, count, name, light)
        return build

    return add


def _changed(change: Callable[[int, Group], dict[str, Any]]) -> list[Group]:
    return [replace(g, **change(n, g)) for n, g in enumerate(clean_groups())]


def _with_rewards(rewards: Callable[[int, Group], Any]) -> list[Group]:
    return _changed(lambda n, g: {"rewards": np.asarray(rewards(n, g), np.float64)})


# ---- rewards ----


@_planted("no-reward-signal", 120, 0)
def all_rewards_equal(folder: Path) -> Path:
    """Every response has reward 1."""
    return write(folder, _with_rewards(lambda n, g: np.ones(K)))


@_planted("equal-rewards", 80, 1)
def most_rewards_equal(folder: Path) -> Path:
    """Two of three groups have reward 0.5 for every response: 80 of 120."""
    return write(folder, _with_rewards(lambda n, g: np.full(K, 0.5) if n % 3 else g.rewards))


@_planted("all-wrong-groups", 90, 1)
def nearly_all_wrong(folder: Path) -> Path:
    """Right or wrong: three of four groups are all wrong, the others have one right response."""
    return write(folder, _with_rewards(lambda n, g: np.eye(K)[n // 4 % K] * (n % 4 == 0)))


@_planted("constant-reward-sampler", 1, 0)
def a_sampler_with_one_reward(folder: Path) -> Path:
    """The person always has 1."""
    persons = [[name == "person" for name in g.samplers] for g in clean_groups()]
    return write(folder, _with_rewards(lambda n, g: np.where(persons[n], 1.0, g.rewards)))


@_planted("reward-follows-length", 120, 0)
def reward_is_the_length(folder: Path) -> Path:
    """The reward is a hundredth of the length; a response of another length in each group."""
    groups = [g for g in clean_groups(400, seed=1) if len(set(g.response_lengths)) > 1][:N_GROUPS]
    groups = [
        replace(g, group_id=f"group-{n:05d}", rewards=np.array(g.response_lengths) / 100)
        for n, g in enumerate(groups)
    ]
    return write(folder, groups)


@_planted("reward-follows-sampler", 120, 0)
def reward_is_the_sampler(folder: Path) -> Path:
    """0 for base, 1 for hot, 2 for person, and a little noise."""
    rng = np.random.default_rng(3)

    def rewards(n: int, g: Group) -> Any:
        return [SAMPLERS.index(name) + rng.normal(0, 0.05) for name in g.samplers]

    return write(folder, _with_rewards(rewards))


@_planted("reward-scale", 120, 0)
def rewards_of_a_million(folder: Path) -> Path:
    """Rewards times a million."""
    return write(folder, _with_rewards(lambda n, g: 1e6 * g.rewards))


@_planted("reward-outliers", 1, 77)
def a_sentinel_among_the_rewards(folder: Path) -> Path:
    """-999999 stands for a failed scorer in group 77."""

    def rewards(n: int, g: Group) -> Any:
        return [-999999.0, *g.rewards[1:]] if n == 77 else g.rewards

    return write(folder, _with_rewards(rewards))


@_planted("missing-components", 80, 40)
def components_that_are_nan(folder: Path) -> Path:
    """Groups 40 to 59 have no number for the only component: 20 groups of 4."""
    groups = clean_groups()
    parts = [
        np.full((1, K), np.nan) if 40 <= n < 60 else np.array([g.rewards])
        for n, g in enumerate(groups)
    ]
    return write(folder, groups, components=parts)


@_planted("mixed-reward-scales", 1, 0)
def one_source_with_points(folder: Path) -> Path:
    """The groups of every second number come from another file, whose rewards are per cent."""

    def change(n: int, g: Group) -> dict[str, Any]:
        assert g.rewards is not None
        return {"rewards": 100 * g.rewards, "source": "points.jsonl"} if n % 2 else {}

    return write(folder, _changed(change))


@_planted("mixed-reward-scales", 2, 0)
def one_sampler_with_points(folder: Path) -> Path:
    """The rewards of person are per cent; those of the two models are not."""
    percent = [[100.0 if name == "person" else 1.0 for name in g.samplers] for g in clean_groups()]
    return write(folder, _with_rewards(lambda n, g: np.array(percent[n]) * g.rewards))


@_planted("reward-scale", 120, 0)
def times_as_rewards(folder: Path) -> Path:
    """The column of rewards is the time of the request, in seconds since 1970."""
    return write(folder, _with_rewards(lambda n, g: 1.7e9 + 60 * n + g.rewards))


# ---- responses and groups ----


@_planted("truncated-responses", 120, 0)
def responses_that_were_cut(folder: Path) -> Path:
    """One response of each group is truncated, 120 of 480; it never is the best."""

    def change(n: int, g: Group) -> dict[str, Any]:
        worst = int(np.argmin(g.rewards))
        ids = [np.where(np.arange(len(r)) == len(r) - 1, 9, r) for r in g.response_token_ids]
        tokens = tuple(
            ids[i].astype(np.int32) if i == worst else r for i, r in enumerate(_ended(g))
        )
        return {"truncated": tuple(i == worst for i in range(K)), "response_token_ids": tokens}

    return write(folder, _changed(change))


def _ended(g: Group) -> list[Any]:
    """The responses of a group, each with the end token as its last."""
    return [np.append(r[:-1], END).astype(np.int32) for r in g.response_token_ids]


@_planted("truncated-best", 30, 1)
def the_best_were_cut(folder: Path) -> Path:
    """In groups 1, 5, 9 … the truncated response has the best reward: 30 of 120."""

    def change(n: int, g: Group) -> dict[str, Any]:
        if n % 4 != 1:
            return {"truncated": (False,) * K, "response_token_ids": tuple(_ended(g))}
        best = int(np.argmax(g.rewards))
        rewards = np.where(np.arange(K) == best, 2.0, g.rewards)
        ids = [np.append(r[:-1], 9 if i == best else END) for i, r in enumerate(_ended(g))]
        return {
            "truncated": tuple(i == best for i in range(K)),
            "rewards": rewards,
            "response_token_ids": tuple(row.astype(np.int32) for row in ids),
        }

    return write(folder, _changed(change))


@_planted("repeated-prompts", 40, 100)
def the_same_prompt_in_several_groups(folder: Path) -> Path:
    """Groups 100 to 119 have the prompts of groups 0 to 19: 40 groups share one."""
    prompts = [g.prompt_token_ids for g in clean_groups()]
    groups = _changed(lambda n, g: {"prompt_token_ids": prompts[n - 100 if n >= 100 else n]})
    return write(folder, groups)


@_planted("large-group", 1, 7)
def one_enormous_group(folder: Path) -> Path:
    """Group 7 has 400 responses."""
    groups = clean_groups()
    many = [g for g in clean_groups(140, seed=5) if not any(g.truncated)][:100]
    groups[7] = replace(
        groups[7],
        response_token_ids=tuple(itertools.chain.from_iterable(g.response_token_ids for g in many)),
        samplers=tuple(itertools.chain.from_iterable(g.samplers for g in many)),
        truncated=(False,) * 400,
        rewards=np.concatenate([g.rewards for g in many if g.rewards is not None]),
        responses=tuple(f"answer 7.{i}" for i in range(400)),
    )
    return write(folder, groups)


@_planted("few-groups", 40, None)
def few_groups(folder: Path) -> Path:
    """40 groups."""
    return write(folder, clean_groups(40))


@_planted("incomplete-groups", 200, None)
def incomplete_groups_dominate(folder: Path) -> Path:
    """200 prompts with one response beside 120 groups."""
    write(folder, clean_groups())
    single = [
        replace(
            g,
            group_id=f"single-{n:05d}",
            response_token_ids=g.response_token_ids[:1],
            samplers=g.samplers[:1],
            truncated=g.truncated[:1],
            rewards=g.rewards[:1] if g.rewards is not None else None,
            responses=None,
        )
        for n, g in enumerate(clean_groups(200, seed=9))
    ]
    return _add_incomplete(folder, single)


# ---- reference ----


def _reference_fault(
    folder: Path, change: Callable[[int, Group, list[Any]], list[Any]], **options: Any
) -> Path:
    groups = clean_groups()
    logprobs = [
        [np.asarray(row, np.float32) for row in change(n, g, own)]
        for n, (g, own) in enumerate(zip(groups, clean_logprobs(groups), strict=True))
    ]
    return write(folder, groups, logprobs, **options)


@_planted("unscored-responses", 240, 60)
def half_of_a_reference(folder: Path) -> Path:
    """The reference has no log-prob of groups 60 to 119: 240 responses."""
    selection = ReferenceSelection(where="source = 'a.jsonl'")
    return write(
        folder, clean_groups(), scored=lambda n: n < 60, reference={"selection": selection}
    )


@_planted("positive-logprobs", 4, 33)
def log_probs_above_zero(folder: Path) -> Path:
    """Group 33 has losses in place of log-probs."""
    return _reference_fault(folder, lambda n, g, own: [-row for row in own] if n == 33 else own)


@_planted("unlikely-responses", 160, 0)
def a_sampler_with_other_tokens(folder: Path) -> Path:
    """Every response of hot has -9 nats per token: 160 of 480, a third of the responses."""

    def change(n: int, g: Group, own: list[Any]) -> list[Any]:
        return [
            np.append(np.full(len(row) - 1, -9.0), -9.0) if name == "hot" else row
            for name, row in zip(g.samplers, own, strict=True)
        ]

    return _reference_fault(folder, change)


@_planted("certain-responses", 40, 50)
def zeros_in_place_of_log_probs(folder: Path) -> Path:
    """Groups 50 to 59 have log-probs of 0."""
    return _reference_fault(
        folder, lambda n, g, own: [0 * row for row in own] if 50 <= n < 60 else own
    )


# ---- manifest ----


@_planted("unknown-tokenizer", 120, None)
def no_tokenizer(folder: Path) -> Path:
    """The manifest names no tokenizer."""
    return write(folder, clean_groups(), tokenizer=None)


@_planted("other-tokenizer", 120, None)
def a_reference_of_another_tokenizer(folder: Path) -> Path:
    """The reference was scored with a tokenizer of another fingerprint."""
    write(folder, clean_groups())

    def changed(newest: Manifest | None) -> Manifest:
        assert newest is not None
        (family,) = newest.references
        other = family.model_copy(update={"tokenizer_fingerprint": sha256_text("other")})
        return newest.model_copy(update={"references": [other]})

    publish(folder, changed)
    return folder


@_planted("older-import", 120, None)
def an_older_import(folder: Path) -> Path:
    """The lineage records import version 1."""
    return write(folder, clean_groups(), lineage=[_import_step(1)])


@_planted("sampler-settings", 1, None)
def two_samplers_under_one_name(folder: Path) -> Path:
    """A merged import had another model under the name base."""
    merged = _import_step(samplers={"base": {"model": "another"}}).model_dump(mode="json")
    step = LineageStep(
        stage="merge", package_version="0", config={}, inputs=[{"path": "b", "lineage": [merged]}]
    )
    return write(folder, clean_groups(), lineage=[_import_step(), step])


def _add_incomplete(folder: Path, single: Sequence[Group]) -> Path:
    entry = write_incomplete(folder, "00000", single, reward=True)
    assert entry is not None
    held = IncompleteGroups(files=[entry], reward=RewardFamily(name="reward", files=[]))
    publish(folder, lambda newest: _replaced(newest, incomplete=held))
    return folder


def _replaced(manifest: Manifest | None, **changes: Any) -> Manifest:
    assert manifest is not None
    return manifest.model_copy(update=changes)


# ---- tokens: the full checks alone find these ----


@_planted("duplicate-responses", 240, 0, light=False)
def copied_responses(folder: Path) -> Path:
    """Responses 1 and 2 of each group are copies of response 0, with its reward: 240 of 480."""
    source = [0, 0, 0, 3]

    def change(n: int, g: Group) -> dict[str, Any]:
        rewards = np.array([0.25, 0.25, 0.25, 1.0] if n % 2 else [0.5, 0.5, 0.5, 0.0])
        return {
            "response_token_ids": tuple(g.response_token_ids[i] for i in source),
            "truncated": tuple(g.truncated[i] for i in source),
            "rewards": rewards,
        }

    return write(folder, _changed(change))


@_planted("contradictory-duplicates", 30, 1, light=False)
def a_scorer_that_disagrees_with_itself(folder: Path) -> Path:
    """In groups 1, 5, 9 … response 1 is a copy of response 0 and has another reward."""

    def change(n: int, g: Group) -> dict[str, Any]:
        ids = g.response_token_ids
        return {"response_token_ids": (ids[0], ids[0], *ids[2:])} if n % 4 == 1 else {}

    return write(folder, _changed(change))


@_planted("empty-responses", 10, 10, light=False)
def responses_that_say_nothing(folder: Path) -> Path:
    """The last response of groups 10 to 19 is an end token alone."""

    def change(n: int, g: Group) -> dict[str, Any]:
        alone = (*g.response_token_ids[:-1], np.array([END], np.int32))
        return {"response_token_ids": alone} if 10 <= n < 20 else {}

    return write(folder, _changed(change))


def _without_end(n: int, g: Group, samplers: Sequence[str]) -> dict[str, Any]:
    rng = np.random.default_rng(n)
    ids = [
        np.append(row[:-1], rng.integers(FIRST_WORD, VOCAB_SIZE)).astype(np.int32)
        if name in samplers
        else row
        for name, row in zip(g.samplers, g.response_token_ids, strict=True)
    ]
    return {"response_token_ids": tuple(ids)}


@_planted("missing-end-token", 468, 0, light=False)
def no_response_ends(folder: Path) -> Path:
    """No response has the end token; 468 of the 480 are not marked as truncated."""
    return write(folder, _changed(lambda n, g: _without_end(n, g, SAMPLERS)))


@_planted("missing-end-token", 160, 0, light=False)
def the_answers_of_a_person_do_not_end(folder: Path) -> Path:
    """The 160 responses of person lack the end token; none is marked as truncated."""

    def change(n: int, g: Group) -> dict[str, Any]:
        ended = replace(g, response_token_ids=tuple(_ended(g)))
        return {**_without_end(n, ended, ["person"]), "truncated": (False,) * K}

    return write(folder, _changed(change))


@_planted("repeated-end-token", 468, 0, light=False)
def two_end_tokens(folder: Path) -> Path:
    """The log's texts hold the end token, and the template wrote another: 468 complete ones."""

    def change(n: int, g: Group) -> dict[str, Any]:
        ids = [np.append(row, [END] * int(row[-1] == END)) for row in g.response_token_ids]
        return {"response_token_ids": tuple(row.astype(np.int32) for row in ids)}

    return write(folder, _changed(change))


@_planted("prompt-in-response", 480, 0, light=False)
def responses_with_their_prompt(folder: Path) -> Path:
    """A generation returned the full text: every response begins with the text of its prompt,
    whose tokens are 8 words and the generation prompt."""

    def change(n: int, g: Group) -> dict[str, Any]:
        words = np.random.default_rng(n).integers(FIRST_WORD, VOCAB_SIZE, 8)
        prompt = np.concatenate([words, [ASSISTANT, NEWLINE]]).astype(np.int32)
        tokens = tuple(np.concatenate([prompt, row]) for row in g.response_token_ids)
        return {"prompt_token_ids": prompt, "response_token_ids": tokens}

    return write(folder, _changed(change))


@_planted("prompt-in-response", 480, 0, light=False)
def responses_with_their_question(folder: Path) -> Path:
    """The texts of the responses begin with the conversation: by their texts, 40 characters of a
    question after the name of the role; their tokens are not those of the prompt."""

    def change(n: int, g: Group) -> dict[str, Any]:
        question = f"What is the sum of {n:06d} and {n + 1:06d}, please?"
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        texts = tuple(f"user\n{question}\nassistant\n{text}" for text in g.responses or ())
        return {"messages": json.dumps(turns), "responses": texts}

    return write(folder, _changed(change))


@_planted("unlikely-first-tokens", 480, 0, light=False)
def first_tokens_of_another_template(folder: Path) -> Path:
    """The first token of every response has -12 nats."""
    return _reference_fault(folder, lambda n, g, own: [np.append([-12.0], row[1:]) for row in own])


@_planted("unlikely-end-tokens", 468, 0, light=False)
def end_tokens_of_another_template(folder: Path) -> Path:
    """The last token of every response has -12 nats; 468 of them are complete."""
    return _reference_fault(folder, lambda n, g, own: [np.append(row[:-1], [-12.0]) for row in own])


@_planted("missing-generation-prompt", 30, 2, light=False)
def prompts_without_a_generation_prompt(folder: Path) -> Path:
    """Prompts 2, 6, 10 … end with the end token of the user's turn and a newline."""

    def change(n: int, g: Group) -> dict[str, Any]:
        ids = np.append(g.prompt_token_ids[:-2], [NEWLINE]).astype(np.int32)
        return {"prompt_token_ids": ids} if n % 4 == 2 else {}

    return write(folder, _changed(change))


def _masked(groups: Sequence[Group], counted: Callable[[Any], Any]) -> list[Group]:
    """Groups whose responses have a second turn, with the mask that `counted` makes of the ids."""
    found = []
    for group in groups:
        ids = tuple(
            np.concatenate([row[:3], [END, NEWLINE, ASSISTANT], row[3:]]).astype(np.int32)
            for row in group.response_token_ids
        )
        masks = tuple(np.asarray(counted(row), bool) for row in ids)
        found.append(replace(group, response_token_ids=ids, loss_mask=masks))
    return found


@_planted("mask-counts-everything", 120, 0, light=False)
def masks_that_count_everything(folder: Path) -> Path:
    """Responses hold a further turn, and the mask is true for all of it."""
    return write(folder, _masked(clean_groups(), np.ones_like))


@_planted("mask-counts-little", 120, 0, light=False)
def masks_that_count_little(folder: Path) -> Path:
    """1 token of 150 counts."""

    def change(n: int, g: Group) -> dict[str, Any]:
        ids = tuple(np.concatenate([np.full(150 - len(r), 7), r]) for r in g.response_token_ids)
        masks = tuple(np.arange(150) == 149 for _ in ids)
        return {
            "response_token_ids": tuple(row.astype(np.int32) for row in ids),
            "loss_mask": masks,
        }

    return write(folder, _changed(change))


# ---- files: errors that stop the checks ----


@_planted("invalid-data", 1, 5, light=False)
def a_mask_that_counts_nothing(folder: Path) -> Path:
    """No token of the second response of group 5 counts."""

    def change(n: int, g: Group) -> dict[str, Any]:
        masks = [np.ones(len(row), bool) for row in g.response_token_ids]
        masks[1] &= n != 5
        return {"loss_mask": tuple(masks)}

    return write(folder, _changed(change))


@_planted("invalid-data", 1, 5)
def a_reward_that_is_nan(folder: Path) -> Path:
    """The second response of group 5 has the reward NaN."""

    def rewards(n: int, g: Group) -> Any:
        return np.where((np.arange(K) == 1) & (n == 5), np.nan, g.rewards)

    return write(folder, _with_rewards(rewards))


@_planted("integrity", 1, None, light=False)
def a_flipped_byte(folder: Path) -> Path:
    """One bit in the middle of a groups file is another."""
    write(folder, clean_groups())
    path = folder / load_manifest(folder).groups[1].path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return folder


@_planted("integrity", 1, None)
def a_missing_file(folder: Path) -> Path:
    """A reference sidecar was deleted."""
    write(folder, clean_groups())
    (folder / load_manifest(folder).references[0].files[1].file.path).unlink()
    return folder


@_planted("integrity", 1, None)
def a_sidecar_of_another_version(folder: Path) -> Path:
    """The manifest names the rewards of a dataset with other groups."""
    other = write(folder / "other", clean_groups(seed=8))
    write(folder, clean_groups())
    sidecars = load_manifest(other).rewards
    mixed = load_manifest(folder).model_copy(update={"rewards": sidecars})
    manifest_path(folder, 1).write_text(dump_manifest(mixed), encoding="utf-8")
    return folder
