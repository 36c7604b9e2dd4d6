"""Judgements of people: read from files into one table, and joined with the dataset's responses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import polars as pl

from gvpo_offline.errors import DataError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.rewards.kinds import PeopleSettings, RatingsSettings, VotesSettings
from gvpo_offline.store.dataset import GroupDataset

_NAMED_BY = {"id": "response_ids", "index": "response_lengths", "sampler": "samplers"}
_SHARE_WON = {"a": 1.0, "b": 0.0, "tie": 0.5}


def read_judgements(settings: PeopleSettings) -> tuple[pl.DataFrame, str]:
    """Read the files of a scorer, whole.

    Returns:
        One row per judgement, in the order of files and rows: `file`, `row` (from 0), `group` (its
        id), `first` (name of the response), `value` (the rating, the rank, or the share of the vote
        that `first` won: 1, 0.5 or 0); of votes also `second`, the other response; of the others
        `rater`, where a column names one. And the SHA-256 of the content of the files, which does
        not depend on their paths or order.

    Raises:
        DataError: an input matches no file, or a row cannot be read; names file, row and group.
        ConfigError: a file type that cannot be read.
        IntegrityError: a file is damaged.
    """
    columns = _columns(settings)
    labels = settings.rating_map if isinstance(settings, RatingsSettings) else {}
    rows, digests = [], []
    for source in find_sources(settings.inputs, limits=settings.limits):
        digests.append(source.sha256(_no_progress))
        for number, values in source.rows(None, _no_progress):
            row = {"file": source.label, "row": number}
            for name, (column, kind) in columns.items():
                row[name] = _cell(
                    _numbered(values, column, labels) if kind is float else values,
                    column,
                    kind,
                    row,
                )
            rows.append(row)
        source.check_unchanged()
    schema = {"file": str, "row": int, **{name: kind for name, (_, kind) in columns.items()}}
    table = pl.DataFrame(rows, schema)
    if isinstance(settings, VotesSettings):
        table = _with_share_won(table)
    return table, sha256_json(sorted(digests))


def _no_progress(n_bytes: int) -> None:
    """No progress bar: these files are small."""


def _columns(settings: PeopleSettings) -> dict[str, tuple[str, type]]:
    """Columns of the table: the column of the files that each is read from, and its type."""
    group: dict[str, tuple[str, type]] = {"group": (settings.group_column, str)}
    if isinstance(settings, VotesSettings):
        names = (settings.first_column, settings.second_column, settings.winner_column)
        return group | {
            name: (column, str)
            for name, column in zip(("first", "second", "winner"), names, strict=True)
        }
    value = (
        settings.rating_column if isinstance(settings, RatingsSettings) else settings.rank_column
    )
    rater = {} if settings.rater_column is None else {"rater": (settings.rater_column, str)}
    return group | {"first": (settings.response_column, str), "value": (value, float)} | rater


def _numbered(
    values: Mapping[str, Any], column: str, labels: Mapping[str, float]
) -> Mapping[str, Any]:
    """A row whose rating, if it is one of the labels, is the number that the label stands for."""
    value = values.get(column)
    label = str(value).lower() if isinstance(value, bool) else value
    if not isinstance(label, str) or label not in labels:
        return values
    return {**values, column: labels[label]}


def _cell(values: Mapping[str, Any], column: str, kind: type, row: dict[str, Any]) -> Any:
    """A cell as text (an id or a word), or as a finite number, which may be written as text."""
    value = values.get(column)
    convertible = kind is float or (isinstance(value, str | int) and value != "")
    try:
        found = kind(value) if convertible and not isinstance(value, bool) else None
        str(found).encode()  # a lone surrogate, which JSON can hold and UTF-8 cannot, is an error
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is not None and (kind is str or math.isfinite(found)):
        return found
    what = "text or a whole number" if kind is str else "a finite number"
    there = column in values
    raise DataError(
        f"column {column} holds {what} in every row",
        received=repr(value) if there else f"the columns {', '.join(values)}",
        remedy=("correct the row" if kind is str else "correct the row, or set rating_map")
        if there
        else "set the name of the column in the scorer's settings",
        file=row["file"],
        row=row["row"],
        group=row.get("group"),
    )


def _with_share_won(votes: pl.DataFrame) -> pl.DataFrame:
    check_rows(
        votes,
        pl.col("first") != pl.col("second"),
        "a vote is between two responses",
        received=lambda row: f"{row['first']!r} twice",
        remedy="remove the row",
    )
    winner = pl.col("winner")
    named = winner.str.to_lowercase().replace_strict(
        _SHARE_WON, default=None, return_dtype=pl.Float64
    )
    first, second = winner == pl.col("first"), winner == pl.col("second")
    votes = votes.with_columns(
        value=pl.when(first).then(1.0).when(second).then(0.0).otherwise(named)
    )
    check_rows(
        votes,
        pl.col("value").is_not_null(),
        "the winner of a vote is a, b, tie, or one of the two responses",
        received=lambda row: row["winner"],
        remedy="correct the row",
    )
    return votes


def join_responses(table: pl.DataFrame, dataset: GroupDataset, response_by: str) -> pl.DataFrame:
    """Replace the names of responses by their indices within the groups.

    Args:
        table: as `read_judgements` returns it.
        dataset: holds the groups.
        response_by: what the names are: "id", "index" or "sampler".

    Returns:
        The same rows: `first` and `second` as indices, and `size`, the group's number of responses.

    Raises:
        DataError: a group or response is not in the dataset, or a name is that of several
            responses; names file, row and group.
    """
    judged = table["group"].unique().implode()
    groups = pl.concat(
        _groups(dataset, row_group, response_by, judged)
        for row_group in range(dataset.n_row_groups)
    )
    table = table.join(groups, on="group", how="left", maintain_order="left")
    n_unknown = table.filter(pl.col("names").is_null())["group"].n_unique()
    check_rows(
        table,
        pl.col("names").is_not_null(),
        "the group of every judgement is in the dataset",
        received=lambda row: f"{row['group']!r} (and {n_unknown - 1} more that are not)",
        remedy="remove the rows, or set group_column to the column with the id of the group",
    )
    responses = (
        groups.explode("names")
        .with_columns(index=pl.int_range(pl.len()).over("group"))
        .group_by("group", name="names")
        .agg(pl.first("index"), matches=pl.len())
    )
    for column in [name for name in ("first", "second") if name in table.columns]:
        table = table.join(
            responses,
            left_on=["group", column],
            right_on=["group", "name"],
            how="left",
            maintain_order="left",
        )
        check_rows(
            table,
            pl.col("matches").eq_missing(1),
            "a judgement names one response of its group",
            received=lambda row, column=column: (  # type: ignore[misc]
                f"{row[column]!r}, which is {'several' if row['matches'] else 'none'} of "
                + ", ".join(row["names"])
            ),
            remedy="correct the row, or response_by",
        )
        table = table.drop(column, "matches").rename({"index": column})
    return table.with_columns(size=pl.col("names").list.len()).drop("names")


def _groups(
    dataset: GroupDataset, row_group: int, response_by: str, judged: pl.Series
) -> pl.DataFrame:
    """`group` and `names`, a list of its responses' names, for the judged groups of a row group."""
    column = _NAMED_BY[response_by]
    stored = pl.DataFrame(dataset.table(row_group, [column]))
    names = pl.col(column) if column in stored.columns else pl.lit(None)
    if response_by == "index":
        names = pl.int_ranges(pl.col(column).list.len())
    place = dataset.location(row_group)
    groups = stored.select(
        file=pl.lit(str(place.file)),
        row=place.first_row + pl.int_range(pl.len()),
        group="group_id",
        names=names.cast(pl.List(pl.String)),
    ).filter(pl.col("group").is_in(judged))
    check_rows(
        groups,
        pl.col("names").is_not_null(),
        "responses that are named by their id have one in the dataset",
        received=lambda row: "a group without response ids",
        remedy="set response_by: index, or sampler",
    )
    return groups.select("group", "names")


def check_rows(
    table: pl.DataFrame,
    valid: pl.Expr,
    rule: str,
    *,
    received: Callable[[dict[str, Any]], str],
    remedy: str,
) -> None:
    """Raise DataError at the first row that is not valid, naming its `file`, `row` and `group`."""
    wrong = table.filter(~valid)
    if len(wrong):
        row = wrong.row(0, named=True)
        place = {name: row[name] for name in ("file", "row", "group")}
        raise DataError(rule, received=received(row), remedy=remedy, **place)
