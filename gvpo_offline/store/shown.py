"""How a dataset prints: in a terminal, and as a table in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, cast

import pyarrow as pa

from gvpo_offline.errors import GVPOError
from gvpo_offline.store.storage import LocalStorage
from gvpo_offline.visible import visible

if TYPE_CHECKING:
    from gvpo_offline.store.dataset import GroupDataset

_MOST_NAMES = 8
_MOST_CHARACTERS = 100


class ShownDataset:
    """A dataset that says what it holds where it is printed.

    The manifest tells most of it. The mean reward is that of the first row group, which is read
    once, and only of a local dataset. Nothing is raised: what cannot be read is left out.
    """

    _mean_reward: str | None = None  # once it has been read

    def __repr__(self) -> str:
        head, rows = _described(cast("GroupDataset", self))
        width = max(len(name) for name, _ in rows)
        return "\n".join([head, *(f"  {name:<{width}}  {text}" for name, text in rows)])

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        head, rows = _described(cast("GroupDataset", self))
        cells = "".join(
            f'<tr><th style="text-align:left">{escape(name)}</th>'
            f'<td style="text-align:left">{escape(text)}</td></tr>'
            for name, text in rows
        )
        return f'<div><code>{escape(head)}</code><table class="dataframe">{cells}</table></div>'


def _described(dataset: GroupDataset) -> tuple[str, list[tuple[str, str]]]:
    """A heading, and what each part holds."""
    manifest = dataset.manifest
    head = f"GroupDataset({_short(str(dataset.root))!r}, version={manifest.version})"
    responses = sum(file.n_responses for file in manifest.groups)
    tokens = sum(file.n_tokens for file in manifest.groups)
    mean = f" ({responses / manifest.n_groups:.3g} a group)" if manifest.n_groups else ""
    waiting = f"; {manifest.n_incomplete:,} incomplete" if manifest.n_incomplete else ""
    info = manifest.tokenizer
    rows = [
        ("groups", f"{manifest.n_groups:,}{waiting}"),
        ("responses", f"{responses:,}{mean}"),
        ("tokens", f"{tokens:,}"),
        ("samplers", _listed(list(manifest.samplers)) or "not described"),
        ("rewards", _rewards(dataset)),
        ("reference", _reference(dataset)),
        ("tokenizer", _short(f"{info.name_or_path} ({info.vocab_size:,} ids)") if info else "-"),
    ]
    if dataset.n_row_groups:
        size, n = int(dataset.row_group_sizes[0]), dataset.n_row_groups
        row_groups = "row group 0 of 1" if n == 1 else f"row group 0 of 0 to {n - 1:,}"
        rows.append(("to read", f"dataset.groups(0): {size:,} groups, {row_groups}"))
    return head, rows


def _rewards(dataset: GroupDataset) -> str:
    if not dataset.rewards:
        held = [f"{family.name}@{family.version}" for family in dataset.manifest.rewards]
        return f"none joined, of {_listed(held)}" if held else "none"
    labels = [
        f"{own.family.name}@{own.family.version}"
        + ("" if own.weight == 1.0 else f" x {own.weight:g}")
        for own in dataset.rewards
    ]
    return f"{_listed(labels)}{_mean_reward(dataset)}"


def _mean_reward(dataset: GroupDataset) -> str:
    """The mean of the first row group; "" for a dataset at a URL, or one that cannot be read."""
    if not dataset.n_row_groups or not isinstance(dataset.storage, LocalStorage):
        return ""
    if dataset._mean_reward is None:
        try:
            column = dataset.table(0, ["rewards"]).column("rewards").combine_chunks()
            values = column.flatten().to_numpy(zero_copy_only=False)
            of = (
                f"the first {len(column):,}" if dataset.n_row_groups > 1 else f"all {len(column):,}"
            )
            dataset._mean_reward = (
                f": mean {values.mean():.4g}, {values.min():.4g} to {values.max():.4g}, "
                f"in {of} groups"
            )
        except (GVPOError, OSError, ValueError, KeyError, pa.ArrowException):
            dataset._mean_reward = ""
    return dataset._mean_reward


def _reference(dataset: GroupDataset) -> str:
    own = dataset.reference
    if own is not None:
        return _short(f"{own.fingerprint[:12]}, {own.described}")
    held = [family.fingerprint[:12] for family in dataset.manifest.references]
    return f"none joined, of {_listed(held)}" if held else "none"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(_short(name) for name in names[:_MOST_NAMES])
    more = len(names) - _MOST_NAMES
    return f"{shown} and {more:,} more" if more > 0 else shown


def _short(text: str) -> str:
    line = visible(" ".join(text.split()))
    return line if len(line) <= _MOST_CHARACTERS else line[: _MOST_CHARACTERS - 1] + "…"
