"""The result of a merge or a compaction, and the texts of its counts."""

from __future__ import annotations

from dataclasses import dataclass

from gvpo_offline.store.coverage import partial_lines
from gvpo_offline.store.manifest import Manifest


@dataclass(frozen=True)
class RewriteResult:
    """The result of `merge` or `compact`.

    Attributes:
        stage: "merge" or "compact".
        manifest: the newest version of the dataset.
        before: numbers of groups, responses and tokens of the dataset before the stage.
        added: numbers of groups, responses and tokens of the added datasets, by folder.
        counts: numbers of groups, responses and tokens of the new version, and of joined groups,
            duplicates and dropped responses and groups.
        left_out: labels of rewards and references that only some of the datasets have.
        skipped: folders whose groups an earlier merge already added.
        changed: whether a new version was published.
        freed: bytes freed by removing older versions; None if none were removed.
    """

    stage: str
    manifest: Manifest
    before: dict[str, int]
    added: dict[str, dict[str, int]]
    counts: dict[str, int]
    left_out: list[str]
    skipped: list[str]
    changed: bool
    freed: int | None = None

    def lines(self) -> list[str]:
        """The lines that the command prints."""
        head = f"done, version {self.manifest.version}" if self.changed else "nothing to do"
        lines = [f"{self.stage}: {head}", f"  before: {_sizes(self.before)}"]
        lines += [f"  added: {_sizes(sizes)} from {name}" for name, sizes in self.added.items()]
        if self.changed:
            lines.append(f"  now: {_sizes(self.counts)} in {len(self.manifest.groups)} files")
        lines += [
            f"  {name} was skipped: an earlier merge already added it" for name in self.skipped
        ]
        lines += [
            f"  {label} was left out: not every dataset has it"
            for label in dict.fromkeys(self.left_out)
        ]
        if self.changed:
            lines += [f"  {line}" for line in partial_lines(self.manifest)]
        for name, text in COUNT_TEXTS.items():
            if self.counts.get(name):
                lines.append(f"  {self.counts[name]:,} {text}")
        for name, text in INCOMPLETE_TEXTS.items():
            if self.counts.get(name):
                lines.append(f"  {self.counts[name]:,} {text}")
        if self.freed is not None:
            lines.append(f"  older versions were removed: {self.freed:,} bytes")
        return lines


_SIZES = ("groups", "responses", "tokens")
COUNT_TEXTS = {
    "joined_groups": "groups were joined from several rows",
    "duplicates": "responses have the token ids of an earlier response of their group",
    "differing_rewards": "of these have another reward than that response",
    "dropped_duplicates": "duplicates were dropped (duplicates: drop)",
    "dropped_singletons": "groups with a single response left were dropped (singletons: drop)",
    "dropped_responses": "groups lost their responses' texts: some of the responses have none",
    "dropped_response_ids": "groups lost their response ids: some of the responses have none, or "
    "two have the same (response_ids: drop)",
}


# Counts that are only there where a dataset has incomplete groups.
INCOMPLETE_TEXTS = {
    "completed_groups": "groups have a response that was an incomplete group, or several",
    "incomplete_groups": "prompts still have a single response (incomplete groups)",
}


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{sizes[name]:,} {name}" for name in _SIZES)
