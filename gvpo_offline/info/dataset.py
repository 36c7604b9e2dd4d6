"""Description of a dataset from its manifests, and on request from surveys of its groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_offline.errors import GVPOError
from gvpo_offline.findings.finding import Finding, verdict
from gvpo_offline.findings.formats.document import as_json
from gvpo_offline.findings.gate import error_finding, light_checks
from gvpo_offline.info.reward_means import reward_means
from gvpo_offline.store.coverage import coverage_of
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.location import is_url, local_path
from gvpo_offline.store.manifest import (
    FileEntry,
    IncompleteGroups,
    Manifest,
    ReferenceFamily,
    RewardFamily,
    Sidecar,
    load_manifest,
    manifest_path,
    manifest_versions,
)
from gvpo_offline.store.prompts import PromptCounts, count_prompts
from gvpo_offline.store.sidecar_choice import WeightedReward
from gvpo_offline.store.storage import open_storage
from gvpo_offline.store.survey import Survey, survey

_REFERENCE_FIELDS = (
    *("fingerprint", "model_name_or_path", "model_class", "dtype", "autocast_dtype"),
    *("attn_implementation", "layout"),
)
QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
# The light checks of this many take about a second.
MOST_CHECKED_RESPONSES = 100_000


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset in a folder, or at a URL.

    Attributes:
        path: the folder, or the URL.
        versions: manifests with the times when they were written (ISO 8601, UTC; "" at a URL),
            oldest first; the last one is the version described. At a URL that one alone.
        surveys: counts over all groups with each reward, by its label; with "" as the only label if
            the dataset has no reward; empty if the groups were not read.
        prompts: counts of groups that share a prompt; None if the groups were not read.
        findings: what the light checks found, by the default thresholds; None if they were not
            done.
        means: mean of each reward over all responses, in the manifest's order; None where unknown.
    """

    path: str
    versions: Sequence[tuple[Manifest, str]]
    surveys: Mapping[str, Survey]
    prompts: PromptCounts | None = None
    findings: Sequence[Finding] | None = None
    means: Sequence[float | None] = ()

    @property
    def manifest(self) -> Manifest:
        """The version described."""
        return self.versions[-1][0]

    def _means(self) -> Sequence[float | None]:
        return self.means or [None] * len(self.manifest.rewards)

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        manifest, written = self.versions[-1]
        befores = [None, *(before for before, _ in self.versions)]
        return {
            "path": self.path,
            "written": written,
            "version": manifest.version,
            "groups": manifest.n_groups,
            "responses": sum(file.n_responses for file in manifest.groups),
            "tokens": sum(file.n_tokens for file in manifest.groups),
            "base": _files(manifest.groups),
            "total": _files(manifest.files()),
            "tokenizer": manifest.tokenizer and manifest.tokenizer.model_dump(),
            "samplers": manifest.samplers,
            "rewards": [
                {**_reward(family, manifest), "mean": mean}
                for family, mean in zip(manifest.rewards, self._means(), strict=True)
            ],
            "references": [_reference(family, manifest) for family in manifest.references],
            **({"incomplete": _incomplete(manifest.incomplete)} if manifest.incomplete else {}),
            "lineage": [step.model_dump(mode="json") for step in manifest.lineage],
            "versions": [
                _version(before, *version)
                for before, version in zip(befores, self.versions, strict=False)
            ],
            **({"content": _content(self.surveys, self.prompts)} if self.surveys else {}),
            **({"checks": _checks(self.findings)} if self.findings is not None else {}),
        }


def dataset_info(
    path: str | Path, version: int | None = None, *, content: bool = False, checks: bool = False
) -> DatasetInfo:
    """Describe a dataset.

    Args:
        path: its folder, or its URL.
        version: an older version; by default the newest.
        content: also survey the groups, with each reward, and do the light checks. Otherwise
            only manifests are read.
        checks: also do the light checks, unless the dataset is at a URL or has more than
            `MOST_CHECKED_RESPONSES`. An error of a file is then a finding.

    Raises:
        DataError: there is no dataset, or no such version.
        IntegrityError: a manifest was altered; and as `survey`.
    """
    if is_url(path):
        versions = [(open_storage(path).manifest(version), "")]
    else:
        root = path = local_path(path)
        newest = load_manifest(root, version)
        older = [number for number in manifest_versions(root) if number < newest.version]
        manifests = [*(load_manifest(root, number) for number in older), newest]
        versions = [(manifest, _written(root, manifest.version)) for manifest in manifests]
    means = reward_means(open_storage(path), versions[-1][0])
    if not content:
        findings = _quick_checks(path, versions[-1][0]) if checks else None
        return DatasetInfo(str(path), versions, {}, findings=findings, means=means)
    dataset = open_dataset(path, version=version, join=())
    found = light_checks(dataset.storage, dataset.manifest)
    surveys = _surveys(dataset, found.surveys)
    prompts = count_prompts(dataset)
    return DatasetInfo(str(path), versions, surveys, prompts, found.findings, means=means)


def _quick_checks(path: str | Path, manifest: Manifest) -> Sequence[Finding] | None:
    n_responses = sum(file.n_responses for file in manifest.groups)
    if is_url(path) or n_responses > MOST_CHECKED_RESPONSES:
        return None
    try:
        return light_checks(open_storage(path), manifest).findings
    except GVPOError as error:
        return [error_finding(error)]


def _written(root: Path, version: int) -> str:
    seconds = manifest_path(root, version).stat().st_mtime
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _surveys(dataset: GroupDataset, known: Mapping[str, Survey]) -> dict[str, Survey]:
    joined = {
        reward_label(family): GroupDataset(
            dataset.storage, dataset.manifest, [WeightedReward(family)]
        )
        for family in dataset.manifest.rewards
    }
    views = joined or {"": dataset}
    return {label: known.get(label) or survey(each) for label, each in views.items()}


def reward_label(family: RewardFamily) -> str:
    """name@version."""
    return f"{family.name}@{family.version}"


# ---- values for JSON ----


def _files(entries: Iterable[FileEntry]) -> dict[str, int]:
    """Number and total length of files."""
    sizes = [entry.bytes for entry in entries]
    return {"files": len(sizes), "bytes": sum(sizes)}


def _sidecars(files: Iterable[Sidecar]) -> dict[str, int]:
    return _files(sidecar.file for sidecar in files)


def _reward(family: RewardFamily, manifest: Manifest) -> dict[str, Any]:
    return {
        "label": reward_label(family),
        "components": family.components,
        "config": family.config,
        "size": _sidecars(family.files),
        **_coverage(family, manifest),
    }


def _coverage(family: RewardFamily | ReferenceFamily, manifest: Manifest) -> dict[str, Any]:
    own = coverage_of(family, manifest)
    return {} if own is None else {"coverage": own.as_dict()}


def _reference(family: ReferenceFamily, manifest: Manifest) -> dict[str, Any]:
    own = manifest.tokenizer and manifest.tokenizer.fingerprint
    other = family.tokenizer_fingerprint
    said = "not said" if None in (own, other) else "the dataset's" if own == other else "another"
    fields = {name: getattr(family, name) for name in _REFERENCE_FIELDS}
    if family.selection is not None:
        fields["selection"] = family.selection.model_dump(mode="json")
    return {
        **fields,
        "tokenizer": said,
        "size": _sidecars(family.files),
        **_coverage(family, manifest),
    }


def _incomplete(held: IncompleteGroups) -> dict[str, Any]:
    return {
        "groups": held.n_groups,
        "reward": held.reward and reward_label(held.reward),
        "size": _files(held.files),
    }


def _version(before: Manifest | None, manifest: Manifest, written: str) -> dict[str, Any]:
    """A version and what it changed against the one before it."""
    old, parts = _parts(before) if before else {}, _parts(manifest)
    known = {entry.path for entry in before.files()} if before else set()
    # A part with other files was written anew, as by merging and compacting.
    return {
        "version": manifest.version,
        "written": written,
        "groups": manifest.n_groups,
        "added": [label for label, paths in parts.items() if old.get(label) != paths],
        "removed": [label for label in old if label not in parts],
        "new": _files(entry for entry in manifest.files() if entry.path not in known),
    }


def _parts(manifest: Manifest) -> dict[str, list[str]]:
    """The paths of each part of a dataset, by its label."""
    families = {f"reward {reward_label(family)}": family.files for family in manifest.rewards}
    families |= {f"reference {f.fingerprint[:12]}": f.files for f in manifest.references}
    base = [entry.path for entry in manifest.groups]
    waiting = [entry.path for entry in manifest.incomplete.files] if manifest.incomplete else []
    return {
        "groups": base,
        **{label: [each.file.path for each in files] for label, files in families.items()},
        **({"incomplete groups": waiting} if waiting else {}),
    }


def _content(surveys: Mapping[str, Survey], prompts: PromptCounts | None) -> dict[str, Any]:
    base = next(iter(surveys.values()))
    rewards = {label: each for label, each in surveys.items() if label and each.n_groups}
    samplers = {
        name: {
            "responses": count,
            "truncated": base.sampler_truncated[name],
            "mean_tokens": base.sampler_tokens[name] / count,
            "mean_rewards": {r: _mean_of(each, name) for r, each in rewards.items()},
        }
        for name, count in sorted(base.samplers.items())
    }
    return {
        "samplers": samplers,
        "rewards": {
            label: {
                "mean": each.reward_mean,
                "min": each.reward_range[0],
                "max": each.reward_range[1],
                "equal_groups": each.equal_reward_groups,
                **({"unrewarded": n} if (n := each.unrewarded_responses) else {}),
            }
            for label, each in rewards.items()
        },
        "group_sizes": dict(sorted(base.group_sizes.items())),
        **({"prompts": _prompts(prompts)} if prompts else {}),
        "lengths": {
            "prompt": _quantiles(base.prompt_lengths),
            "response": _quantiles(base.response_lengths),
        },
        "quantiles": list(QUANTILES),
    }


def _mean_of(survey: Survey, sampler: str) -> float:
    """Mean reward of a sampler's responses that have one; nan if none has."""
    count = survey.samplers[sampler] - survey.sampler_unrewarded[sampler]
    return survey.sampler_rewards[sampler] / count if count else math.nan


def _checks(findings: Sequence[Finding]) -> dict[str, Any]:
    return {"verdict": verdict(findings), "findings": [as_json(each) for each in findings]}


def _prompts(counts: PromptCounts) -> dict[str, Any]:
    return {
        "prompts": counts.prompts,
        "groups_with_shared_prompt": counts.sharing,
        "exact": counts.exact,
    }


def _quantiles(counts: Counter[int]) -> list[int]:
    """For each q of QUANTILES the smallest value that at least the share q does not exceed."""
    if not counts:
        return []
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    ranks = np.maximum(np.ceil(np.array(QUANTILES) * below[-1]), 1)
    return [values[at] for at in np.searchsorted(below, ranks).tolist()]
