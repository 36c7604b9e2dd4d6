"""The result of an import."""

from __future__ import annotations

from dataclasses import dataclass

from gvpo_offline.store.manifest import Manifest


@dataclass(frozen=True)
class ImportResult:
    """The result of an import.

    Attributes:
        manifest: of the dataset.
        counts: numbers of rows, responses, groups and tokens, and of dropped or cut responses and
            groups by reason.
        already_imported: True if the folder already held this import and nothing was done.
    """

    manifest: Manifest
    counts: dict[str, int]
    already_imported: bool

    def lines(self) -> list[str]:
        """The lines that the command prints."""
        counts = {name: f"{n:,}" for name, n in self.counts.items()}
        head = "nothing to do, the folder already holds this import"
        lines = [f"import: {head if self.already_imported else 'done'}"]
        lines.append(
            f"  {counts['rows']} rows: {counts['groups']} groups, {counts['responses']} responses, "
            f"{counts['tokens']} tokens"
        )
        lines.append(f"  samplers: {', '.join(sorted(self.manifest.samplers))}")
        for name, text in COUNT_TEXTS.items():
            if self.counts.get(name):
                lines.append(f"  {counts[name]} {text}")
        if self.counts.get(INCOMPLETE):
            lines.append(
                f"  {counts[INCOMPLETE]} incomplete groups: prompts with a single response, which "
                "nothing trains on until `merge` adds responses (singletons: keep)"
            )
        return lines


# The count of prompts with one response, present where there are some.
INCOMPLETE = "incomplete_groups"
# Printed text for each count of dropped or changed responses and groups.
COUNT_TEXTS = {
    "truncated_responses": "responses are marked as truncated",
    "cut_overlong_responses": "responses were cut to max_length (overlong: truncate)",
    "dropped_overlong_responses": "responses over max_length were dropped",
    "dropped_overlong_prompts": "groups were dropped: their prompt alone reaches max_length",
    "dropped_empty_responses": "empty responses were dropped (empty_responses: drop)",
    "dropped_unrewarded_responses": "responses without a reward were dropped "
    "(missing_rewards: drop)",
    "dropped_singletons": "groups with a single response were dropped (singletons: drop)",
    "dropped_failed_responses": "responses that failed were dropped (failed_responses: drop)",
    "dropped_repeated_responses": "responses were dropped: repeated from an earlier step",
    "dropped_groups_without_responses": "groups were dropped: no response was left",
}
