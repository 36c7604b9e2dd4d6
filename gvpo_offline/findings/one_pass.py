"""All checks of a dataset in a pass that another reader makes over its row groups."""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa

from gvpo_offline.findings.batch import LIGHT_COLUMNS, batch_of
from gvpo_offline.findings.ends import EndTokens, observed_ends
from gvpo_offline.findings.finding import Finding
from gvpo_offline.findings.full import FULL_COLUMNS, TokenScan
from gvpo_offline.findings.judge import Judge
from gvpo_offline.findings.light import LightScan, in_order
from gvpo_offline.findings.thresholds import Thresholds
from gvpo_offline.findings.tokens import token_batch_of
from gvpo_offline.store.dataset import GroupDataset

CHECKED_COLUMNS = tuple(dict.fromkeys((*LIGHT_COLUMNS, *FULL_COLUMNS)))
"""What all checks read; where a sidecar is not joined, its columns are absent."""


class PassChecks:
    """The light and the full checks of the row groups of a dataset, each of which is added once.

    They find what `check_dataset` finds with the same reward and reference, but damaged bytes and
    groups that break a rule: those stop the pass with an error.

    Args:
        dataset: the dataset, with the reward and the reference to check.
        thresholds: by default all defaults.
        end_ids: as in `full_findings`.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`.
    """

    def __init__(
        self,
        dataset: GroupDataset,
        thresholds: Thresholds | None = None,
        end_ids: Collection[int] = (),
    ) -> None:
        self._dataset, self._thresholds = dataset, thresholds or Thresholds()
        ends = EndTokens(frozenset(end_ids)) if end_ids else observed_ends(dataset)
        self._light = LightScan(dataset, self._thresholds)
        self._tokens = TokenScan(self._thresholds, ends)

    def add(self, table: pa.Table, row_group: int) -> None:
        """Count a row group with CHECKED_COLUMNS among its columns.

        Raises:
            IntegrityError, DataError: as `batch_of`.
        """
        batch = batch_of(self._dataset, row_group, table, self._light.names)
        if batch is not None:
            self._light.add(batch)
            self._tokens.add(token_batch_of(table, row_group))

    def findings(self) -> list[Finding]:
        """What was found, most severe first."""
        judge = Judge(self._thresholds, self._light.result().findings)
        self._tokens.judge(judge, self._dataset, tokens_too=True)
        return in_order(judge.findings)
