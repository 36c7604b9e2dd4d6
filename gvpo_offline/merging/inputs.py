"""The datasets that are merged: their common families, and their rows with all sidecars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.errors import DataError
from gvpo_offline.group import Int32Array
from gvpo_offline.hashing import sha256_json, text_keys
from gvpo_offline.merging.families import Family, families_of
from gvpo_offline.merging.settings import IncompleteRule
from gvpo_offline.store.arrow import column_array, split_list
from gvpo_offline.store.columns import RowGroupLocation, check_logprobs
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

# Stored lengths and hashes are computed again when groups are written.
_COUNTED = ("n_tokens", "prompt_length", "response_lengths", "prompt_hash")
GROUP_COLUMNS = tuple(column for column in GROUPS_COLUMNS if column.name not in _COUNTED)
LOCATION_COLUMNS = ("key", "input", "row_group", "row")

Rename = Callable[[Sequence[str], Sequence[Int32Array]], list[str]]


class InputDataset:
    """A dataset that is merged, opened with the sidecars of its groups.

    Args:
        root: folder of the dataset.
        position: index among the datasets that are merged, and among the members of a family.

    Attributes:
        number: index among the inputs of the rewrite. Where datasets have incomplete groups, it is
            set to another number than `position`.
    """

    def __init__(self, root: Path, position: int) -> None:
        self.root = root
        self.position = self.number = position
        self.manifest = load_manifest(root)
        self.groups = GroupDataset(root, self.manifest)
        self._joined: list[tuple[Family, GroupDataset | None]] = []

    def join(self, families: Sequence[Family]) -> None:
        """Check every file that will be read, and open the sidecars of `families`.

        Raises:
            IntegrityError: a file is damaged, or does not belong to the groups.
        """
        self.groups.verify()
        for family in families:
            member = family.members[self.position]
            if self.manifest.groups and not member.files:
                self._joined.append((family, None))
                continue
            dataset = (
                GroupDataset(self.root, self.manifest, rewards=[WeightedReward(member)])
                if isinstance(member, RewardFamily)
                else GroupDataset(self.root, self.manifest, reference=member)
            )
            dataset.verify()
            self._joined.append((family, dataset))

    def keep(self, families: Sequence[Family]) -> None:
        """Read only these of the families that `join` opened."""
        self._joined = [(f, d) for f, d in self._joined if any(f is kept for kept in families)]

    def content(self, families: Sequence[Family]) -> str:
        """SHA-256 over the hashes of the groups files and of the sidecars of `families`."""
        sidecars = [_by_base(family.members[self.position].files) for family in families]
        return sha256_json(
            [
                [base.sha256, *(s.get(base.sha256, "") for s in sidecars)]
                for base in self.manifest.groups
            ]
        )

    @property
    def bytes(self) -> int:
        """Total size of the groups files and of the opened sidecars, in bytes."""
        own = sum(entry.bytes for entry in self.manifest.groups)
        return own + sum(
            sidecar.file.bytes
            for family, _ in self._joined
            for sidecar in family.members[self.position].files
        )

    def location(self, row_group: int) -> RowGroupLocation:
        """The file of a row group, and the number of its first row in the file."""
        return self.groups.location(row_group)

    def ids(self, row_group: int, rename: Rename | None) -> tuple[list[str], list[str]]:
        """The ids of a row group's groups in this dataset, and their ids in the result."""
        names = ["group_id"] if rename is None else ["group_id", "prompt_token_ids"]
        table = self.groups.table(row_group, names)
        own: list[str] = table.column("group_id").to_pylist()
        if rename is None:
            return own, own
        return own, rename(own, split_list(column_array(table, "prompt_token_ids")))

    def rows(self, row_group: int, rename: Rename | None) -> pa.Table:
        """A row group as a table with the schema `spill_schema`.

        Raises:
            DataError: a list has another length than its group.
            IntegrityError: a page is damaged, or a sidecar's rows do not match the groups.
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
            if dataset is None:  # not known of these rows
                values |= family.gaps(sizes.to_pylist())
                continue
            names = [column.name for column in family.columns]
            # With the stored lengths in the table, reading checks every list.
            table = dataset.table(row_group, [*names, "response_lengths"])
            table = table.select(
                [name for name in ("group_id", *names) if name in table.schema.names]
            )
            place = dataset.location(row_group, names[0])
            _check_lengths(table, sizes, place)
            check_logprobs(table, column_array(groups, "response_token_ids"), place)
            values |= _values(table, family.columns, family.field)
        schema = spill_schema([family for family, _ in self._joined])
        return pa.Table.from_arrays([values[name] for name in schema.names], schema=schema)


def groups_sha256(files: Sequence[BaseFile]) -> str:
    """SHA-256 over the hashes of groups files: identifies the groups of a version."""
    return sha256_json([file.sha256 for file in files])


def added_sha256(manifest: Manifest) -> str:
    """Identifies what a merge adds of a version: its groups, and its incomplete groups if any."""
    groups = groups_sha256(manifest.groups)
    if manifest.incomplete is None:
        return groups
    return sha256_json([groups, *(file.sha256 for file in manifest.incomplete.files)])


def spill_schema(families: Sequence[Family]) -> pa.Schema:
    """Schema of spilled rows: their location, the columns of groups and those of all families."""
    location = [("key", pa.uint64()), *((name, pa.int32()) for name in LOCATION_COLUMNS[1:])]
    sidecars = [(f.field(c.name), c.type) for f in families for c in f.columns]
    return pa.schema([*location, *((c.name, c.type) for c in GROUP_COLUMNS), *sidecars])


def _values(
    table: pa.Table, columns: Sequence[Column], field: Callable[[str], str]
) -> dict[str, pa.Array]:
    """The columns by their name in the spill; nulls for a column that the table does not have."""
    return {
        field(column.name): column_array(table, column.name)
        if column.name in table.column_names
        else pa.nulls(table.num_rows, column.type)
        for column in columns
    }


def _check_lengths(table: pa.Table, sizes: pa.ChunkedArray, location: RowGroupLocation) -> None:
    """Raise DataError unless each list over responses has as many items as its group.

    With a shorter list, picking would read values of the next group.
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
                received=f"another number for {sizes[int(bad[0])].as_py()} responses",
                remedy="write the column again for these groups",
                **location.of_row(table, int(bad[0])),
            )


def check_compatible(inputs: Sequence[InputDataset]) -> None:
    """Check that the datasets have the same tokenizer and consistent samplers, each given once.

    Raises:
        IntegrityError: two tokenizers differ.
        DataError: only some of the datasets record a tokenizer; a dataset is given twice; or one
            sampler name has different settings.
    """
    first, *others = inputs
    samplers = dict(first.manifest.samplers)
    for other in others:
        mine, theirs = first.manifest.tokenizer, other.manifest.tokenizer
        if (mine is None) != (theirs is None):
            raise DataError(
                "merged datasets have the same tokenizer",
                received=f"{(first if mine is None else other).root} records no tokenizer",
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
                    "a sampler's name has one set of settings",
                    received=f"{name}: {settings} in this dataset, {samplers[name]} in another",
                    remedy="import (or sample) one of the two again under another name",
                    file=other.root,
                )
    contents = [added_sha256(item.manifest) for item in inputs]
    for number, item in enumerate(inputs):
        if contents[number] in contents[:number]:
            raise DataError(
                "each merged dataset has groups files of its own",
                received="a dataset with the same groups files as another one",
                remedy="give every dataset once",
                file=item.root,
            )


def common_families(
    inputs: Sequence[InputDataset], incomplete: IncompleteRule
) -> tuple[list[Family], list[str]]:
    """Find the rewards and references that all datasets have.

    Rewards are the same if their manifest entries are equal apart from the files; references, if
    their fingerprints are equal.

    Args:
        inputs: the datasets.
        incomplete: what becomes of a reward or reference that only some of the datasets have.

    Returns:
        The families that all datasets have, or with `keep` every family, and the labels of the
        others.

    Raises:
        DataError: a dataset lacks a reward or reference and `incomplete` is `error`, or has another
            one under its name and `incomplete` is `keep`.
    """
    # A dataset of incomplete groups alone has no sidecars, so it lacks none.
    whole = [item for item in inputs if item.manifest.groups] or inputs
    held = [families_of(item.manifest) for item in whole]
    keys = list(dict.fromkeys(key for families in held for key in families))
    common, left_out = [], []
    for key in keys:
        label, _ = key
        template = next(families[key] for families in held if key in families)
        lacking = [i for i, f in zip(whole, held, strict=True) if key not in f]
        clash = any(label == other for item in lacking for other, _ in families_of(item.manifest))
        if not lacking or (incomplete == "keep" and not clash):
            members = tuple(_member(item, key, template) for item in inputs)
            partial = bool(lacking) or any(member.partial for member in members)
            common.append(Family(label, _columns(inputs, members), members, partial))
            continue
        left_out.append(label)
        if incomplete != "drop":
            raise DataError(
                "all merged datasets have the same rewards and references",
                received=f"{label}, which {lacking[0].root} "
                + ("has with another configuration" if clash else "does not have"),
                remedy="compute it for that dataset first, or drop it from the new version "
                "(incomplete: drop); the older version keeps it"
                if clash
                else "keep it for the responses that have it (incomplete: keep) and score the "
                "others afterwards (only_missing: true); or compute it for that dataset first, or "
                "drop it from the new version (incomplete: drop); the older version keeps it",
                file=inputs[0].root,
            )
    return common, left_out


def _columns(
    inputs: Sequence[InputDataset], members: Sequence[RewardFamily | ReferenceFamily]
) -> tuple[Column, ...]:
    """The columns of a family's sidecars without `group_id`: the required ones, and the optional
    ones that any sidecar has.
    """
    present: set[str] = set()
    if not any(member.files for member in members) and isinstance(members[0], RewardFamily):
        present.update(["components"] if members[0].components else [])
    for item, member in zip(inputs, members, strict=True):
        for sidecar in member.files:
            entry = sidecar.file
            with open_parquet(item.root / entry.path, entry.footer_sha256) as file:
                present.update(file.schema_arrow.names)
    known = REWARDS_COLUMNS if isinstance(members[0], RewardFamily) else REFERENCE_COLUMNS
    return tuple(c for c in known[1:] if c.required or c.name in present)


def _member(
    item: InputDataset, key: tuple[str, str], template: RewardFamily | ReferenceFamily
) -> RewardFamily | ReferenceFamily:
    """A dataset's own entry of a family; without files if it has incomplete groups alone."""
    return families_of(item.manifest).get(key) or template.model_copy(
        update={"files": [], "partial": False}
    )


def _by_base(files: Sequence[Sidecar]) -> dict[str, str]:
    return {sidecar.base_sha256: sidecar.file.sha256 for sidecar in files}
