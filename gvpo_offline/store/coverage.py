"""Which responses of a dataset have a number of a reward or a log-prob of a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.store.arrow import as_numpy, column_array
from gvpo_offline.store.manifest import Manifest, ReferenceFamily, RewardFamily, Sidecar


@dataclass(frozen=True)
class Coverage:
    """How much of a dataset has numbers of a partial reward or reference.

    Attributes:
        responses, groups: responses with a number, and groups in which every response has one.
        of_responses, of_groups: those of the dataset.
    """

    responses: int
    of_responses: int
    groups: int
    of_groups: int

    @property
    def text(self) -> str:
        """The coverage on one line."""
        return (
            f"{self.responses:,} of {self.of_responses:,} responses; all responses in "
            f"{self.groups:,} of {self.of_groups:,} groups"
        )

    def as_dict(self) -> dict[str, int]:
        """Values for JSON."""
        return dict(vars(self))


def coverage_of(family: RewardFamily | ReferenceFamily, manifest: Manifest) -> Coverage | None:
    """The coverage of a partial family, from the manifest alone; None if it is not partial.

    The responses that a reference of a selection leaves out count as those without a number.
    """
    if not family.partial:
        return None
    n_responses = sum(file.n_responses for file in manifest.groups)
    return Coverage(
        n_responses - sum(sidecar.missing_responses for sidecar in family.files),
        n_responses,
        manifest.n_groups - sum(sidecar.missing_groups for sidecar in family.files),
        manifest.n_groups,
    )


def partial_lines(
    manifest: Manifest, among: Sequence[RewardFamily | ReferenceFamily] | None = None
) -> list[str]:
    """A line for each partial reward and reference: what it covers, and how the rest is scored.

    Args:
        manifest: of the dataset.
        among: of these families alone; None: of all.
    """
    named: list[tuple[str, str, RewardFamily | ReferenceFamily]] = [
        *((f"reward {f.name}@{f.version}", "reward", f) for f in manifest.rewards),
        *((f"reference {f.fingerprint[:12]}", "reference", f) for f in manifest.references),
    ]
    lines = []
    for label, command, family in named:
        own = coverage_of(family, manifest)
        if own is not None and (among is None or family in among):
            lines.append(
                f"{label} covers {own.text} (`gvpo-offline {command} --only_missing true` scores "
                "the others)"
            )
    return lines


def count_missing(table: pa.Table, name: str) -> dict[str, int]:
    """Fields `missing_responses` and `missing_groups` of a sidecar, of some of its rows.

    Args:
        table: rows of the sidecar.
        name: the column of its numbers, one per response.
    """
    column = column_array(table, name)
    absent = np.isnan(as_numpy(column.flatten()))
    rows = np.repeat(np.arange(len(column)), as_numpy(pc.list_value_length(column)))
    return {
        "missing_responses": int(absent.sum()),
        "missing_groups": len(np.unique(rows[absent])),
    }


def covering(sidecars: Sequence[Sidecar], scored: Sequence[Sidecar]) -> list[Sidecar]:
    """Sidecars, with those in `scored` instead of the ones of the same groups files."""
    new = {sidecar.base_sha256: sidecar for sidecar in scored}
    return [new.get(sidecar.base_sha256, sidecar) for sidecar in sidecars]
