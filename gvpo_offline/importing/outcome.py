"""The result of an import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gvpo_offline.importing.broken_rows import summary_lines
from gvpo_offline.importing.tally import sampler_lines
from gvpo_offline.store.manifest import Manifest
from gvpo_offline.store.writer import IMPORT_REPORT


@dataclass(frozen=True)
class ImportResult:
    """The result of an import.

    Attributes:
        manifest: of the dataset.
        counts: numbers of rows, responses, groups and tokens, and of dropped or cut responses and
            groups by reason.
        already_imported: True if the folder already held this import and nothing was done.
        details: what was dropped, by rule and by sampler; see `LineageStep.details`.
        notes: lines about how the log was read.
    """

    manifest: Manifest
    counts: dict[str, int]
    already_imported: bool
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

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
        lines += [f"  {note}" for note in self.notes]
        for name, text in {**COUNT_TEXTS, **FOUND_TEXTS}.items():
            if self.counts.get(name):
                lines.append(f"  {counts[name]} {text}{self._note(name)}")
                by_sampler = self.details.get("samplers", {}).get(name, {})
                if name in _CHOSEN_BY or len(by_sampler) > 1:
                    said = sampler_lines(by_sampler, _CHOSEN_BY.get(name, "the import"))
                    lines += [f"    {line}" for line in said]
        if self.counts.get(INCOMPLETE):
            lines.append(
                f"  {counts[INCOMPLETE]} incomplete groups: prompts with a single response, which "
                "nothing trains on until `merge` adds responses (singletons: keep)"
            )
        return lines + self._broken_lines()

    def _note(self, name: str) -> str:
        if name == "over_model_max_length_responses":
            return f" ({self.details.get('model_max_length', 0):,})"
        if name == "identical_groups" and "identical_groups_counted_on" in self.details:
            return f" (estimated from {self.details['identical_groups_counted_on']})"
        return ""

    def _broken_lines(self) -> list[str]:
        """What `on_error: drop` dropped."""
        broken = self.details.get("broken")
        if not broken:
            return []
        rows, groups = broken["rows"], broken["groups"]
        head = f"  {rows:,} rows and {groups:,} groups broke a rule and were dropped"
        head += f" (on_error: drop); {IMPORT_REPORT} lists them"
        return [head, *(f"    {line}" for line in summary_lines(broken))]


# The count of prompts with one response, present where there are some.
INCOMPLETE = "incomplete_groups"
# Printed text for each count of dropped or changed responses and groups.
COUNT_TEXTS = {
    "truncated_responses": "responses are marked as truncated",
    "not_as_rendered_responses": "responses differ from their rendering by the chat template, "
    "which trims, drops or rewrites text; the logged text was kept",
    "spanning_tokens": "responses share a token with the end of their prompt in the rendering; "
    "they were tokenised as a continuation of the prompt",
    "reopened_reasoning": "responses begin with a tag that the generation prompt holds already "
    "(<think>); it was not repeated",
    "cut_overlong_responses": "responses were cut to max_length (overlong: truncate)",
    "unpadded_responses": "responses were logged with padding behind their end token, which was "
    "removed",
    "responses_that_end_in_padding": "responses end with the padding token and no end token before "
    "it; they were imported as logged",
    "dropped_overlong_responses": "responses over max_length were dropped",
    "dropped_overlong_prompts": "groups were dropped: their prompt alone reaches max_length",
    "dropped_empty_responses": "empty responses were dropped (empty_responses: drop)",
    "dropped_unrewarded_responses": "responses without a reward were dropped "
    "(missing_rewards: drop)",
    "dropped_singletons": "groups with a single response were dropped (singletons: drop)",
    "dropped_failed_responses": "responses that failed were dropped (failed_responses: drop)",
    "dropped_repeated_responses": "responses were dropped: repeated from an earlier step",
    "dropped_unmatched_rows": "rows were dropped: their key is not in a joined file "
    "(on_missing: drop)",
    "dropped_groups_without_responses": "groups were dropped: no response was left",
}

# As COUNT_TEXTS; recorded only if they are not 0.
FOUND_TEXTS = {
    "dropped_other_spans": "spans are no requests to a model (tools, agents, chains …) and were "
    "left out",
    "unused_annotations": "scores, or ids that have scores, belong to no single response of "
    "the log",
    "dropped_filter_responses": "responses were read once: rows of other filters repeat them",
    "identical_responses": "responses repeat another response of their group, token for token",
    "identical_groups": "groups repeat another group: the same prompt and the same responses",
    "differing_metadata_groups": "groups have rows whose kept columns differ; those of the first "
    "row are stored",
    "over_model_max_length_responses": "responses are longer, with their prompt, than the "
    "tokenizer's model_max_length",
    "groups_reduced_by_errors": "groups are without the responses of their broken rows "
    "(on_error: drop)",
}

# The setting by which responses are chosen that are dropped for a reason.
_CHOSEN_BY = {
    "dropped_overlong_responses": "overlong: drop",
    "dropped_empty_responses": "empty_responses: drop",
    "dropped_unrewarded_responses": "missing_rewards: drop",
    "dropped_singletons": "singletons: drop",
}
