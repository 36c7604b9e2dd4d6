"""The checks that read tokens: copies, end tokens, masks, log-probs of first and last tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.findings.batch import Examples, Flags, Floats, Ints
from gvpo_offline.findings.echo import prompts_in_responses
from gvpo_offline.findings.ends import EndTokens, ends_of, observed_ends
from gvpo_offline.findings.finding import Finding, Place
from gvpo_offline.findings.judge import FEW_CASES, Judge
from gvpo_offline.findings.thresholds import Thresholds
from gvpo_offline.findings.tokens import TOKEN_COLUMNS, TokenBatch, token_batch
from gvpo_offline.store.arrow import as_numpy, column_array, list_offsets
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.row_groups import PrefetchedRowGroups

FULL_COLUMNS = (
    *TOKEN_COLUMNS,
    *("prompt_token_ids", "messages", "responses", "response_messages"),
    *("rewards", "ref_token_logprobs"),
)
"""What the checks of tokens read; where a sidecar is not joined, its columns are absent."""
Progress = Callable[[Iterable[int]], Iterable[int]]
# Rules of shares: the name, what the share is of, its unit, and what is true of it.
_OF_SCORES = (
    (
        "contradictory-duplicates",
        "copied",
        "groups",
        "with equal responses give them different rewards",
    ),
    ("unlikely-first-tokens", "scored", "responses", "have a first token below {low} nats"),
    ("unlikely-end-tokens", "scored ends", "responses", "have an end token below {low} nats"),
)
_OF_TOKENS = (
    ("duplicate-responses", "responses", "responses", "repeat an earlier one of their group"),
    ("empty-responses", "responses", "responses", "hold no text"),
    ("repeated-end-token", "responses", "responses", "end with two end tokens{ids}"),
    ("prompt-in-response", "long prompts", "responses", "to long prompts begin with the prompt"),
    ("missing-generation-prompt", "chat prompts", "prompts", "end with the end of a turn{ids}"),
    (
        "mask-counts-everything",
        "masked",
        "groups",
        "with a loss mask count every token of several turns",
    ),
)


def full_findings(
    dataset: GroupDataset,
    thresholds: Thresholds | None = None,
    *,
    end_ids: Collection[int] = (),
    tokens_too: bool = True,
    progress: Progress | None = None,
) -> list[Finding]:
    """The findings of the checks that read tokens.

    Args:
        dataset: the dataset, with the reward and the reference to check.
        thresholds: by default all defaults.
        end_ids: ids of the tokens that end a response, by the tokenizer. None given: those that end
            most of the first responses (`observed_ends`).
        tokens_too: False: only what a further reward or reference adds (contradictory copies,
            log-probs of tokens).
        progress: wraps the row group numbers.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`.
    """
    ends = EndTokens(frozenset(end_ids)) if end_ids else observed_ends(dataset)
    found = TokenScan(thresholds or Thresholds(), ends)
    numbers: Iterable[int] = PrefetchedRowGroups(dataset, FULL_COLUMNS)
    for row_group in progress(numbers) if progress else numbers:
        batch = token_batch(dataset, row_group, FULL_COLUMNS)
        if batch.table.num_rows:
            found.add(batch, tokens_too=tokens_too)
    judge = Judge(thresholds or Thresholds())
    found.judge(judge, dataset, tokens_too=tokens_too)
    return judge.findings


@dataclass
class TokenScan:
    """Counts over the tokens.

    Attributes:
        thresholds: min_token_logprob says which tokens count as unlikely.
        ends: the tokens that end a response.
        counts: what was counted, by name.
        by_sampler: complete responses without an end token, by sampler.
    """

    thresholds: Thresholds
    ends: EndTokens
    counts: Counter[str] = field(default_factory=Counter)
    by_sampler: Counter[str] = field(default_factory=Counter)
    _examples: dict[str, Examples] = field(default_factory=dict)

    def add(self, batch: TokenBatch, *, tokens_too: bool = True) -> None:
        """Count a batch; `tokens_too` as in `full_findings`."""
        self.counts["responses"] += len(batch.ends)
        self.counts["groups"] += len(batch.sizes)
        at_end = np.isin(batch.last, list(self.ends.ids))
        missing = ~at_end & ~batch.truncated
        self.counts["complete"] += int((~batch.truncated).sum())
        self._count("missing-end-token", batch, missing)
        self.by_sampler.update(batch.samplers[i] for i in np.flatnonzero(missing).tolist())
        alone = at_end & (batch.ends - batch.begins == 1)
        self._count("empty-responses", batch, alone | _blank(batch))
        lengths = batch.ends - batch.begins
        before = batch.tokens[np.maximum(batch.ends - 2, batch.begins)]
        self._count("repeated-end-token", batch, at_end & (lengths > 1) & (before == batch.last))
        if tokens_too:
            echoes, judged = prompts_in_responses(batch)
            self._count("prompt-in-response", batch, echoes)
            self.counts["long prompts"] += int(judged.sum())
        self._add_copies(batch)
        self._add_masks(batch)
        self._add_prompts(batch)
        if "ref_token_logprobs" in batch.table.column_names:
            self._add_logprobs(batch, at_end)

    def _count(self, name: str, batch: TokenBatch, flags: Flags) -> None:
        """Count responses, by (N,) flags."""
        self.counts[name] += int(flags.sum())
        self._keep(name, batch, batch.any(flags))

    def _keep(self, name: str, batch: TokenBatch, groups: Flags) -> None:
        self._examples.setdefault(name, Examples()).add(batch, groups)

    def _add_copies(self, batch: TokenBatch) -> None:
        rewards = _flat(batch.table, "rewards")
        copied, differing = (np.zeros(len(batch.sizes), np.bool_) for _ in range(2))
        for row in _maybe_copied(batch).tolist():
            start, k = int(batch.starts[row]), int(batch.sizes[row])
            spans = zip(batch.begins[start : start + k], batch.ends[start : start + k], strict=True)
            own = [batch.tokens[a:b].tobytes() for a, b in spans]
            different = len(set(own))
            if different == k:
                continue
            copied[row] = True
            self.counts["duplicate-responses"] += k - different
            if rewards is not None:
                pairs = set(zip(own, rewards[start : start + k].tolist(), strict=True))
                differing[row] = len(pairs) > different
        self.counts["copied"] += int(copied.sum())
        self.counts["contradictory-duplicates"] += int(differing.sum())
        self._keep("duplicate-responses", batch, copied)
        self._keep("contradictory-duplicates", batch, differing)

    def _add_masks(self, batch: TokenBatch) -> None:
        if not batch.masked.any():
            return
        inner = ends_of(batch, self.ends.ids)
        inner[batch.ends - 1] = False
        turns = batch.any(batch.token_counts(inner) > 0) | _further_messages(batch)
        lengths = batch.ends - batch.begins
        counted = np.add.reduceat(batch.token_counts(batch.counted), batch.starts)
        total = np.add.reduceat(lengths, batch.starts)
        full = batch.masked & turns & (counted == total)
        self.counts["masked"] += int(batch.masked.sum())
        self.counts["mask-counts-everything"] += int(full.sum())
        self.counts["masked tokens"] += int(total[batch.masked].sum())
        self.counts["counted tokens"] += int(counted[batch.masked].sum())
        self._keep("mask-counts-everything", batch, full)
        self._keep("mask-counts-little", batch, batch.masked)

    def _add_prompts(self, batch: TokenBatch) -> None:
        if "messages" not in batch.table.column_names:
            return
        chat = as_numpy(column_array(batch.table, "messages").is_valid())
        prompts = column_array(batch.table, "prompt_token_ids")
        offsets, ids = list_offsets(prompts), as_numpy(prompts.values)
        # A newline may follow the end of a turn.
        two = np.stack([ids[offsets[1:] - 1], ids[np.maximum(offsets[1:] - 2, offsets[:-1])]])
        ended = chat & np.isin(two, list(self.ends.ids)).any(0)
        self.counts["chat prompts"] += int(chat.sum())
        self.counts["missing-generation-prompt"] += int(ended.sum())
        self._keep("missing-generation-prompt", batch, ended)

    def _add_logprobs(self, batch: TokenBatch, at_end: Flags) -> None:
        column = column_array(batch.table, "ref_token_logprobs")
        valid = np.repeat(as_numpy(column.is_valid()), batch.sizes)
        responses = column.flatten()
        offsets, values = list_offsets(responses), as_numpy(responses.values)
        # A response that was not scored has no log-probs; another has one per token.
        scored = np.zeros(len(batch.ends), np.bool_)
        scored[valid] = np.diff(offsets) > 0
        rows = np.flatnonzero(np.diff(offsets) > 0)
        low = float(self.thresholds.min_token_logprob)  # type: ignore[arg-type]
        first, last = (np.zeros(len(batch.ends), np.bool_) for _ in range(2))
        first[scored] = values[offsets[:-1][rows]] < low
        last[scored] = values[offsets[1:][rows] - 1] < low
        complete = scored & at_end & ~batch.truncated
        self.counts["scored"] += int(scored.sum())
        self.counts["scored ends"] += int(complete.sum())
        self._count("unlikely-first-tokens", batch, first)
        self._count("unlikely-end-tokens", batch, last & complete)

    # ---- findings ----

    def judge(self, judge: Judge, dataset: GroupDataset, *, tokens_too: bool) -> None:
        """Add the findings."""
        shares = [*_OF_SCORES, *(_OF_TOKENS if tokens_too else ())]
        if tokens_too:
            self._judge_ends(judge, dataset)
            self._judge_little(judge, dataset)
        facts = {"low": self.thresholds.min_token_logprob, "ids": self._ids()}
        for rule, of, unit, what in shares:
            if rule == "contradictory-duplicates" and self.counts[rule] < FEW_CASES:
                continue
            places = self._places(rule, dataset)
            said = what.format(**facts)
            judge.share(rule, self.counts[rule], self.counts[of], unit, said, places)

    def _places(self, name: str, dataset: GroupDataset) -> Sequence[Place]:
        return self._examples.get(name, Examples()).places(dataset)

    def _ids(self) -> str:
        ids = ", ".join(map(str, sorted(self.ends.ids)[:5]))
        return f" (id {ids})" if ids else ""

    def _judge_ends(self, judge: Judge, dataset: GroupDataset) -> None:
        name = "missing-end-token"
        if not self.ends.ids:
            why = f" (no id ends a good part of them; id {self.ends.commonest} ends "
            why += f"{self.ends.share:.1%})"
        else:
            worst = self.by_sampler.most_common(5)
            why = "; by sampler: " + ", ".join(f"{who} {count:,}" for who, count in worst)
        judge.share(
            name,
            self.counts[name],
            self.counts["complete"],
            "responses",
            f"that are not truncated have no end token{self._ids()}",
            self._places(name, dataset),
            more=why,
        )

    def _judge_little(self, judge: Judge, dataset: GroupDataset) -> None:
        name, limit = "mask-counts-little", judge.limit("min_counted_share")
        counted, total = self.counts["counted tokens"], self.counts["masked tokens"]
        if limit is None or not total or counted / total >= limit.value:
            return
        judge.found(
            name,
            f"the loss masks count {counted:,} of {total:,} response tokens "
            f"({counted / total:.2%}); min_counted_share is {limit.value:g}",
            self.counts["masked"],
            self.counts["groups"],
            "groups",
            self._places(name, dataset),
            "min_counted_share",
        )


def _flat(table: pa.Table, name: str) -> Floats | None:
    if name not in table.column_names:
        return None
    return np.asarray(as_numpy(column_array(table, name).flatten()), np.float64)


def _maybe_copied(batch: TokenBatch) -> Ints:
    """The groups that may hold equal responses: two of them have the same length and the same sum
    of ids."""
    groups = np.repeat(np.arange(len(batch.sizes)), batch.sizes)
    sums = np.add.reduceat(batch.tokens, batch.begins, dtype=np.int64)
    lengths = batch.ends - batch.begins
    order = np.lexsort((sums, lengths, groups))
    same = np.ones(max(len(order) - 1, 0), np.bool_)
    for values in (groups, lengths, sums):
        same &= values[order][1:] == values[order][:-1]
    return np.unique(groups[order][1:][same])


def _blank(batch: TokenBatch) -> Flags:
    """(N,) whether the stored text of a response is empty or white space, in groups whose responses
    are texts."""
    none = np.zeros(len(batch.ends), np.bool_)
    if "responses" not in batch.table.column_names:
        return none
    column = column_array(batch.table, "responses")
    valid = np.repeat(as_numpy(column.is_valid()), batch.sizes)
    texts = pc.fill_null(column.flatten(), "x")
    none[valid] = as_numpy(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0))
    # The text of several messages is in another column.
    return none & ~np.repeat(_further_messages(batch), batch.sizes)


def _further_messages(batch: TokenBatch) -> Flags:
    """(G,) whether a response of the group is more than one text."""
    none = np.zeros(len(batch.sizes), np.bool_)
    if "response_messages" not in batch.table.column_names:
        return none
    column = column_array(batch.table, "response_messages")
    rows = as_numpy(pc.list_parent_indices(column))
    filled = as_numpy(pc.fill_null(pc.not_equal(column.flatten(), ""), False))
    none[rows[filled]] = True
    return none
