"""What an import came to."""

from __future__ import annotations

from dataclasses import dataclass

from gvpo_offline.store.manifest import Manifest


@dataclass(frozen=True)
class ImportResult:
    """What an import made.

    Attributes:
        manifest: the dataset's.
        counts: rows, responses, groups, tokens; and what was dropped or cut, by reason.
        already_imported: the folder held this very import, and nothing was done.
    """

    manifest: Manifest
    counts: dict[str, int]
    already_imported: bool

    def lines(self) -> list[str]:
        """The result for people, one fact a line."""
        counts = {name: f"{n:,}" for name, n in self.counts.items()}
        head = "nothing to do, the folder holds this very import"
        lines = [f"import: {head if self.already_imported else 'done'}"]
        lines.append(
            f"  {counts['rows']} rows: {counts['groups']} groups, {counts['responses']} responses, "
            f"{counts['tokens']} tokens"
        )
        lines.append(f"  samplers: {', '.join(sorted(self.manifest.samplers))}")
        for name, text in COUNT_TEXTS.items():
            if self.counts.get(name):
                lines.append(f"  {counts[name]} {text}")
        return lines


# What an import may have left out or changed, and how that is said.
COUNT_TEXTS = {
    "truncated_responses": "responses are marked as truncated",
    "cut_overlong_responses": "responses were cut to max_length (overlong: truncate)",
    "dropped_overlong_responses": "responses over max_length were dropped",
    "dropped_overlong_prompts": "groups were dropped: their prompt leaves no room in max_length",
    "dropped_empty_responses": "empty responses were dropped (empty_responses: drop)",
    "dropped_unrewarded_responses": "responses without a reward were dropped "
    "(missing_rewards: drop)",
    "dropped_singletons": "groups with a single response were dropped (singletons: drop)",
    "dropped_failed_responses": "responses that failed were dropped (failed_responses: drop)",
    "dropped_repeated_responses": "responses were left out: the log repeats an earlier step's",
    "dropped_groups_without_responses": "groups were dropped: none of their responses was left",
}
