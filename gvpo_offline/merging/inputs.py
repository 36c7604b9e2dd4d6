"""The datasets that are joined: what they have in common, and their rows with every sidecar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.errors import DataError
from gvpo_offline.group import Int32Array
from gvpo_offline.hashing import sha256_json, text_keys
from gvpo_offline.store.arrow import column_array, split_list
from gvpo_offline.store.columns import RowGroupLocation
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import (
    BaseFile,
    Manifest,
    ReferenceFamily,
    RewardFamily,
    Sidecar,
    load_manifest,
)
from gvpo_offline.store.parquet import open_parquet
from gvpo_offline.store.response_index import RESPONSE_AXIS
from gvpo_offline.store.schema import GROUPS_COLUMNS, REFERENCE_COLUMNS, REWARDS_COLUMNS, Column
from gvpo_offline.store.sidecar_choice import WeightedReward
from gvpo_offline.tokenizer import check_same_tokenizer

# Stored lengths are counted again where groups are written.
_COUNTED = ("n_tokens", "prompt_length", "response_lengths")
GROUP_COLUMNS = tuple(column for column in GROUPS_COLUMNS if column.name not in _COUNTED)
PLACE_COLUMNS = ("key", "input", "row_group", "row")

Rename = Callable[[Sequence[str], Sequence[Int32Array]], list[str]]


@dataclass(frozen=True)
class Family:
    """A reward or a reference that every dataset has.

    Attributes:
        label: what it is called in messages.
        columns: of its sidecars, `group_id` left out.
        members: the family in each dataset's manifest.
    """

    label: str
    columns: tuple[Column, ...]
    members: tuple[RewardFamily | ReferenceFamily, ...]

    def field(self, name: str) -> str:
        """What one of its columns is called beside those of other families."""
        return f"{self.label}/{name}"

    @property
    def folder(self) -> str:
        """Where the first dataset keeps its sidecars, relative to that dataset's folder."""
        return str(Path(self.members[0].files[0].file.path).parent)


class Input:
    """A dataset, opened with all that is known of its groups.

    Args:
        root: its folder.
        number: its place among the datasets that are joined.
    """

    def __init__(self, root: Path, number: int) -> None:
        self.root = root
        self.number = number
        self.manifest = load_manifest(root)
        self.groups = GroupDataset(root, self.manifest)
        self._joined: list[tuple[Family, GroupDataset]] = []

    def join(self, families: Sequence[Family]) -> None:
        """Check every file that is about to be read, and open these families' sidecars.

        Raises:
            IntegrityError: a file is damaged, or does not belong to the groups.
        """
        self.groups.verify()
        for family in families:
            member = family.members[self.number]
            dataset = (
                GroupDataset(self.root, self.manifest, rewards=[WeightedReward(member)])
                if isinstance(member, RewardFamily)
                else GroupDataset(self.root, self.manifest, reference=member)
            )
            dataset.verify()
            self._joined.append((family, dataset))

    def content(self, families: Sequence[Family]) -> str:
        """SHA-256 over the hashes of the groups and of these families' sidecars."""
        sidecars = [_by_base(family.members[self.number].files) for family in families]
        return sha256_json(
            [[base.sha256, *(s[base.sha256] for s in sidecars)] for base in self.manifest.groups]
        )

    @property
    def bytes(self) -> int:
        """Length of all files of groups and sidecars, in bytes."""
        own = sum(entry.bytes for entry in self.manifest.groups)
        return own + sum(
            sidecar.file.bytes
            for family, _ in self._joined
            for sidecar in family.members[self.number].files
        )

    def location(self, row_group: int) -> RowGroupLocation:
        """The file of a row group, and the row that it begins with there."""
        return self.groups.location(row_group)

    def ids(self, row_group: int, rename: Rename | None) -> tuple[list[str], list[str]]:
        """The own ids of a row group's groups, and those that they bear in the result."""
        names = ["group_id"] if rename is None else ["group_id", "prompt_token_ids"]
        table = self.groups.table(row_group, names)
        own: list[str] = table.column("group_id").to_pylist()
        if rename is None:
            return own, own
        return own, rename(own, split_list(column_array(table, "prompt_token_ids")))

    def rows(self, row_group: int, rename: Rename | None) -> pa.Table:
        """A row group in the shape of `spill_schema`.

        Raises:
            DataError: a list has another length than its group.
            IntegrityError: a page is damaged, or a sidecar's rows are another file's.
        """
        groups = self.groups.table(row_group, [column.name for column in GROUP_COLUMNS])
        sizes = pc.list_value_length(groups.column("response_token_ids"))
        _check_lengths(groups, sizes, self.location(row_group))
        values = _values(groups, GROUP_COLUMNS, lambda name: name)
        if rename is not None:
            prompts = split_list(column_array(groups, "prompt_token_ids"))
            values["group_id"] = pa.array(rename(values["group_id"].to_pylist(), prompts))
        n = groups.num_rows
        values["key"] = pa.array(text_keys(values["group_id"].to_pylist()))
        values["input"] = pa.array(np.full(n, self.number, np.int32))
        values["row_group"] = pa.array(np.full(n, row_group, np.int32))
        values["row"] = pa.array(np.arange(n, dtype=np.int32))
        for family, dataset in self._joined:
            names = [column.name for column in family.columns]
            # With the stored lengths beside them, reading looks at every number.
            table = dataset.table(row_group, [*names, "response_lengths"])
            table = table.select(
                [name for name in ("group_id", *names) if name in table.schema.names]
            )
            _check_lengths(table, sizes, dataset.location(row_group, names[0]))
            values |= _values(table, family.columns, family.field)
        schema = spill_schema([family for family, _ in self._joined])
        return pa.Table.from_arrays([values[name] for name in schema.names], schema=schema)


def groups_sha256(files: Sequence[BaseFile]) -> str:
    """SHA-256 over the hashes of groups files: what the groups of a version *are*."""
    return sha256_json([file.sha256 for file in files])


def spill_schema(families: Sequence[Family]) -> pa.Schema:
    """Rows with where they came from, their groups' columns and those of every family."""
    place = [("key", pa.uint64()), *((name, pa.int32()) for name in PLACE_COLUMNS[1:])]
    sidecars = [(f.field(c.name), c.type) for f in families for c in f.columns]
    return pa.schema([*place, *((c.name, c.type) for c in GROUP_COLUMNS), *sidecars])


def _values(
    table: pa.Table, columns: Sequence[Column], field: Callable[[str], str]
) -> dict[str, pa.Array]:
    """The columns by field; nulls for one that the table does not have."""
    return {
        field(column.name): column_array(table, column.name)
        if column.name in table.column_names
        else pa.nulls(table.num_rows, column.type)
        for column in columns
    }


def _check_lengths(table: pa.Table, sizes: pa.ChunkedArray, location: RowGroupLocation) -> None:
    """Raise DataError unless every list that goes through the responses is as long as the group is
    large: picking would go on in the next group's.
    """
    for name in table.column_names:
        axis = RESPONSE_AXIS.get(name)
        if axis is None:
            continue
        array = column_array(table, name)
        if axis == 1:
            outer = pc.list_value_length(array).fill_null(0).to_numpy()
            rows = np.repeat(np.arange(table.num_rows), outer)
            lengths = pc.list_value_length(array.flatten())
        else:
            rows = np.arange(table.num_rows)
            lengths = pc.list_value_length(array)
        wrong = pc.not_equal(lengths, sizes.take(pa.array(rows)).combine_chunks()).fill_null(False)
        bad = rows[np.asarray(wrong.to_numpy(zero_copy_only=False))]
        if len(bad):
            raise DataError(
                f"{name} has one entry per response",
                received=f"another number than the group's {sizes[int(bad[0])].as_py()} responses",
                remedy="write the column again for these groups",
                **location.of_row(table, int(bad[0])),
            )


def check_compatible(inputs: Sequence[Input]) -> None:
    """Raise unless the datasets' token ids and samplers mean the same.

    Raises:
        IntegrityError: two tokenizers differ.
        DataError: only one of two datasets knows its tokenizer; one is given twice; or a name
            stands for two samplers.
    """
    first, *others = inputs
    samplers = dict(first.manifest.samplers)
    for other in others:
        mine, theirs = first.manifest.tokenizer, other.manifest.tokenizer
        if (mine is None) != (theirs is None):
            raise DataError(
                "datasets are merged that have one tokenizer",
                received=f"{(first if mine is None else other).root} does not say which it has",
                remedy="import it again with tokenizer_name_or_path",
                file=other.root,
            )
        if mine is not None and theirs is not None:
            check_same_tokenizer(
                *(mine.fingerprint, str(first.root), theirs.fingerprint, str(other.root)),
                file=other.root,
            )
        for name, settings in other.manifest.samplers.items():
            if samplers.setdefault(name, settings) != settings:
                raise DataError(
                    "a sampler's name stands for one set of settings",
                    received=f"{name}: {settings} beside {samplers[name]}",
                    remedy="import (or sample) one of the two again under another name",
                    file=other.root,
                )
    contents = [groups_sha256(item.manifest.groups) for item in inputs]
    for number, item in enumerate(inputs):
        if contents[number] in contents[:number]:
            raise DataError(
                "each dataset that is merged has groups of its own",
                received="one whose files are those of another",
                remedy="name every dataset once",
                file=item.root,
            )


def common_families(inputs: Sequence[Input], *, leave_out: bool) -> tuple[list[Family], list[str]]:
    """The rewards and references that all datasets have, and the labels of the others.

    A reward is the same by all that the manifest says of it, a reference by its fingerprint.

    Args:
        inputs: the datasets.
        leave_out: accept that some do not have all.

    Raises:
        DataError: some do not have all, and `leave_out` is not set.
    """
    held = [_families(item.manifest) for item in inputs]
    keys = list(dict.fromkeys(key for families in held for key in families))
    common, incomplete = [], []
    for key in keys:
        members = tuple(families[key] for families in held if key in families)
        label, _ = key
        if len(members) == len(inputs):
            common.append(Family(label, _columns(inputs, members), members))
            continue
        incomplete.append(label)
        if not leave_out:
            lacking = next(i for i, f in zip(inputs, held, strict=True) if key not in f)
            otherwise = any(label == other for other, _ in _families(lacking.manifest))
            raise DataError(
                "a merged dataset has a reward or reference for every response, or not at all",
                received=f"{label}, which {lacking.root} "
                + ("has with another configuration" if otherwise else "does not have"),
                remedy="compute it there first, or leave out what is incomplete "
                "(incomplete: drop); the older version keeps it",
                file=inputs[0].root,
            )
    return common, incomplete


def _columns(
    inputs: Sequence[Input], members: Sequence[RewardFamily | ReferenceFamily]
) -> tuple[Column, ...]:
    """The columns of a family's sidecars, `group_id` left out: what is required, and what any of
    them has.
    """
    present: set[str] = set()
    for item, member in zip(inputs, members, strict=True):
        for sidecar in member.files:
            entry = sidecar.file
            with open_parquet(item.root / entry.path, entry.footer_sha256) as file:
                present.update(file.schema_arrow.names)
    known = REWARDS_COLUMNS if isinstance(members[0], RewardFamily) else REFERENCE_COLUMNS
    return tuple(c for c in known[1:] if c.required or c.name in present)


def _families(manifest: Manifest) -> dict[tuple[str, str], RewardFamily | ReferenceFamily]:
    """A dataset's families by label and by what else makes them the same as another's."""
    found: dict[tuple[str, str], RewardFamily | ReferenceFamily] = {}
    for family in manifest.rewards:
        described = family.model_dump(mode="json", exclude={"files"})
        found[f"reward {family.name}@{family.version}", sha256_json(described)] = family
    for reference in manifest.references:
        label = f"reference {reference.fingerprint[:12]}"
        found[label, reference.fingerprint] = reference
    return found


def _by_base(files: Sequence[Sidecar]) -> dict[str, str]:
    return {sidecar.base_sha256: sidecar.file.sha256 for sidecar in files}
