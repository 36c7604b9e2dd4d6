"""The light checks of a reference's log-probs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gvpo_offline.findings.batch import Batch, Examples
from gvpo_offline.findings.judge import FEW_CASES, Judge
from gvpo_offline.findings.thresholds import Thresholds
from gvpo_offline.rules import impossible_logprobs
from gvpo_offline.store.dataset import GroupDataset

_CERTAIN = 1e-6


@dataclass
class ReferenceScan:
    """Counts of one reference.

    Attributes:
        thresholds: min_token_logprob says which responses count as unlikely.
    """

    thresholds: Thresholds
    scored: Counter[int] = field(default_factory=Counter)
    unlikely: Counter[int] = field(default_factory=Counter)
    positive: int = 0
    certain: int = 0
    unscored: int = 0
    _first: dict[int, Examples] = field(default_factory=dict)
    _examples: dict[str, Examples] = field(
        default_factory=lambda: {name: Examples() for name in ("positive", "certain", "unscored")}
    )

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        if batch.reference is None:
            return
        per_token = batch.reference / np.maximum(batch.lengths, 1)
        scored = ~np.isnan(per_token)
        flags = {
            "positive": impossible_logprobs(batch.reference, batch.lengths),
            "certain": np.abs(per_token) <= _CERTAIN,
            "unscored": ~scored,
        }
        for name, own in flags.items():
            setattr(self, name, getattr(self, name) + int(own.sum()))
            self._examples[name].add(batch, batch.any(own))
        low = per_token < float(self.thresholds.min_token_logprob)  # type: ignore[arg-type]
        self.scored.update(batch.samplers[scored].tolist())
        self.unlikely.update(batch.samplers[low].tolist())
        for sampler in np.unique(batch.samplers[low]).tolist():
            examples = self._first.setdefault(sampler, Examples())
            if not examples.full:
                examples.add(batch, batch.any((batch.samplers == sampler) & low))

    def judge(self, judge: Judge, dataset: GroupDataset, names: Sequence[str]) -> None:
        """Add the findings."""
        n_groups, family = dataset.n_groups, dataset.reference
        if family is None:
            if n_groups and not dataset.manifest.references:
                judge.found(
                    "missing-reference", "no log-probs of a reference", n_groups, n_groups, "groups"
                )
            return
        label = f" by reference {family.fingerprint[:12]}"
        label = label if len(dataset.manifest.references) > 1 else ""
        tokenizer = dataset.manifest.tokenizer
        own, other = tokenizer and tokenizer.fingerprint, family.tokenizer_fingerprint
        if own and other and own != other:
            judge.found(
                "other-tokenizer",
                f"reference {family.fingerprint[:12]} was scored with the tokenizer {other[:12]}, "
                f"the dataset's is {own[:12]}",
                n_groups,
                n_groups,
                "groups",
            )
        total = self.scored.total() + self.unscored
        self._judge_counts(judge, dataset, total, label)
        self._judge_unlikely(judge, dataset, names, label)

    def _judge_counts(self, judge: Judge, dataset: GroupDataset, total: int, label: str) -> None:
        places = {name: each.places(dataset) for name, each in self._examples.items()}
        if self.positive:
            judge.found(
                "positive-logprobs",
                f"{self.positive:,} of {total:,} responses have log-probs above 0, or below "
                f"-131,072 nats a token{label}",
                self.positive,
                total,
                "responses",
                places["positive"],
            )
        unit, what = "responses", f"have a log-prob of 0{label}"
        judge.share("certain-responses", self.certain, total, unit, what, places["certain"])
        selection = dataset.reference.selection if dataset.reference else None
        judge.share(
            "unscored-responses",
            self.unscored,
            total,
            unit,
            f"have no log-prob{label}",
            places["unscored"],
            more=f" (scored: {selection.text})" if selection and selection.text else "",
        )

    def _judge_unlikely(
        self, judge: Judge, dataset: GroupDataset, names: Sequence[str], label: str
    ) -> None:
        limit = judge.limit("max_unlikely_share")
        if limit is None:
            return
        worst = [
            sampler
            for sampler, count in sorted(self.unlikely.items(), key=lambda each: -each[1])
            if count >= FEW_CASES and count / self.scored[sampler] > limit.value
        ]
        if not worst:
            return
        count, of = (sum(each[s] for s in worst) for each in (self.unlikely, self.scored))
        told = [f"{names[s]} ({self.unlikely[s] / self.scored[s]:.1%})" for s in worst[:5]]
        whose = f"sampler{'s' if len(worst) > 1 else ''} {', '.join(told)}"
        judge.found(
            "unlikely-responses",
            f"{count:,} of {of:,} responses of {whose} have a log-prob per token below "
            f"{self.thresholds.min_token_logprob} nats{label}; max_unlikely_share is "
            f"{limit.value:g}",
            count,
            of,
            "responses",
            self._first[worst[0]].places(dataset),
            "max_unlikely_share",
        )
