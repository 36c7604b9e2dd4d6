"""The groups that findings of the gate give as examples, read again to be shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from gvpo_offline.findings.finding import Finding
from gvpo_offline.report.dataset.batch import SHOWN_COLUMNS
from gvpo_offline.report.dataset.candidates import Candidate
from gvpo_offline.store.arrow import column_array
from gvpo_offline.store.dataset import GroupDataset

_EXAMPLES = 3  # groups of each finding


def flag_of(finding: Finding) -> str:
    """The flag of the groups that a finding gives as examples."""
    return f"check: {finding.rule}"


def flags_by_group(findings: Iterable[Finding]) -> dict[str, list[str]]:
    """The flags of each group that findings give as an example, by its id."""
    flags: dict[str, list[str]] = {}
    for each in findings:
        for group, _, _ in _places(each):
            flags.setdefault(group, []).append(flag_of(each))
    return flags


def example_candidates(dataset: GroupDataset, findings: Iterable[Finding]) -> list[Candidate]:
    """The first groups of each finding, each group once; one row group is read for each of them.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`.
    """
    places = dict.fromkeys((file, row) for each in findings for _, file, row in _places(each))
    starts = _starts(dataset) if places else {}
    found = []
    for file, row in places:
        held = starts.get(file, [])
        at = int(np.searchsorted([first for first, _ in held], row, side="right")) - 1
        if at >= 0:
            first, number = held[at]
            table = dataset.table(number, SHOWN_COLUMNS)
            if row - first < table.num_rows:
                one = table.take(pa.array([row - first]))
                found.append(Candidate((number, row - first), file, row, one, _tokens(one)))
    return found


def _places(finding: Finding) -> Iterator[tuple[str, str, int]]:
    """Group, file and row of the first examples that are groups."""
    held = [each for each in finding.examples if each.group is not None and each.row is not None]
    for each in held[:_EXAMPLES]:
        assert each.group is not None
        assert each.row is not None
        yield each.group, each.file, each.row


def _starts(dataset: GroupDataset) -> dict[str, list[tuple[int, int]]]:
    """By file: the first row of each row group in the file, and its number in the dataset."""
    found: dict[str, list[tuple[int, int]]] = {}
    for number in range(dataset.n_row_groups):
        location = dataset.location(number)
        found.setdefault(str(location.file), []).append((location.first_row, number))
    return found


def _tokens(table: pa.Table) -> int:
    prompts = column_array(table, "prompt_token_ids").flatten()
    return len(prompts) + len(column_array(table, "response_token_ids").flatten().flatten())
