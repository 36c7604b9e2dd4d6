"""JSON Schemas of the on-disk format, for programs in other languages: the folder `schemas/`.

`python -m gvpo_offline.contract schemas` generates them from the code; a test checks that the
folder is up to date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from gvpo_offline.files import replace_text
from gvpo_offline.findings.formats.document import document_schema
from gvpo_offline.rules import MIN_GROUP_SIZE
from gvpo_offline.store.commit import SealedRecord
from gvpo_offline.store.manifest import SealedManifest
from gvpo_offline.store.schema import (
    GROUPS_COLUMNS,
    INCOMPLETE_COLUMNS,
    REFERENCE_COLUMNS,
    REWARDS_COLUMNS,
    SCHEMA_VERSION,
    Column,
)

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PER_RESPONSE = {
    "response_lengths",
    "samplers",
    "truncated",
    "response_token_ids",
    "loss_mask",
    "responses",
    "response_ids",
    "response_messages",
    "rewards",
    "ref_seq_logprobs",
    "ref_token_logprobs",
    "sampler_seq_logprobs",
}


def _json_type(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        return {"type": "array", "items": _json_type(kind.value_type)}
    if pa.types.is_unsigned_integer(kind):
        return {"type": "integer", "minimum": 0}
    if pa.types.is_integer(kind):
        return {"type": "integer"}
    if pa.types.is_floating(kind):
        return {"type": "number"}
    if pa.types.is_boolean(kind):
        return {"type": "boolean"}
    return {"type": "string"}


def _column(column: Column, incomplete: bool) -> dict[str, Any]:
    described = _json_type(column.type)
    if column.name in _PER_RESPONSE:
        described["minItems"] = 1 if incomplete else MIN_GROUP_SIZE
        if incomplete:
            described["maxItems"] = 1
    if column.name == "group_id":
        described["minLength"] = 1
    if column.name == "prompt_token_ids":
        described["minItems"] = 1
        described["items"]["minimum"] = 0
    if column.name == "response_token_ids":
        described["items"]["minItems"] = 1
        described["items"]["items"]["minimum"] = 0
    if not column.required:
        described["type"] = [described["type"], "null"]
    return {**described, "description": column.doc, "x-arrow-type": str(column.type)}


def row_schema(
    title: str, columns: Sequence[Column], *, incomplete: bool = False
) -> dict[str, Any]:
    """The JSON Schema of one row of a Parquet file with `columns`.

    Args:
        title: of the schema.
        columns: of the file.
        incomplete: whether a row has one response, instead of at least two.
    """
    return {
        "$schema": _DIALECT,
        "title": title,
        "type": "object",
        "x-schema-version": SCHEMA_VERSION,
        "properties": {column.name: _column(column, incomplete) for column in columns},
        "required": [column.name for column in columns if column.required],
    }


def contract() -> dict[str, str]:
    """The generated files of `schemas/`: text by file name."""
    rewards = [column for column in REWARDS_COLUMNS[1:] if column.required]
    inline = (*GROUPS_COLUMNS, *rewards, *REFERENCE_COLUMNS[1:])
    schemas: dict[str, dict[str, Any]] = {
        "groups.schema.json": row_schema("One group: a row of a groups file", GROUPS_COLUMNS),
        "rewards.schema.json": row_schema("A row of a rewards sidecar", REWARDS_COLUMNS),
        "reference.schema.json": row_schema("A row of a reference sidecar", REFERENCE_COLUMNS),
        "training_file.schema.json": row_schema(
            "A row of a self-contained Parquet file for training", inline
        ),
        "incomplete.schema.json": row_schema(
            "One prompt with one response: a row of a file of incomplete groups",
            INCOMPLETE_COLUMNS,
            incomplete=True,
        ),
        "manifest.schema.json": {"$schema": _DIALECT, **SealedManifest.model_json_schema()},
        "findings.schema.json": {"$schema": _DIALECT, **document_schema()},
        "commit.schema.json": {"$schema": _DIALECT, **SealedRecord.model_json_schema()},
    }
    return {name: json.dumps(schema, indent=2) + "\n" for name, schema in schemas.items()}


def main(folder: Path) -> None:
    """Write the JSON Schemas to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contract().items():
        replace_text(folder / name, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
