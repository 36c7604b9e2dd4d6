"""The prompts of a run: normalised, tokenised and checked once, before the first response.

They are written to one Parquet file under `prompts/`, in the order of the inputs, with a row group
for each task, so that a task reads only its own prompts.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from gvpo_offline.chat.encoder import Encoder
from gvpo_offline.conversations import prompt as prompt_of
from gvpo_offline.conversations import template_arguments
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Int32Array
from gvpo_offline.hashing import sha256_json
from gvpo_offline.importing.as_chat import ChatPrompts
from gvpo_offline.importing.fragment import Fragment, prompt_key, with_location
from gvpo_offline.importing.sources.files import Source
from gvpo_offline.importing.sources.media import text_rows
from gvpo_offline.paths import MISSING, value_at
from gvpo_offline.progress_bar import ProgressBar
from gvpo_offline.sampling.settings import SampleConfig
from gvpo_offline.sampling.system_prompts import (
    PlainPrompt,
    limits_with_system,
    prompt_lengths,
    refuse_text,
    system_prompts,
)
from gvpo_offline.sampling.waiting import WaitingPrompt, prompt_sources
from gvpo_offline.store.arrow import list_array, to_rows
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.location import local_path
from gvpo_offline.store.manifest import FileEntry
from gvpo_offline.store.parquet import open_parquet, read_row_group, write_parquet
from gvpo_offline.tokenizer import tokenizer_info
from gvpo_offline.values import plain

_VERSION = 1
_TASK = "prompts"
_TOKENIZED_AT_ONCE = 256
_LONGEST = "longest_prompt_tokens"
T = TypeVar("T")
_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("prompt", pa.string()),
        ("messages", pa.string()),
        ("metadata", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("template_arguments", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One prompt.

    Attributes:
        index: its number among all prompts.
        key: SHA-256 (hexadecimal) of its content.
        source: name of its input.
        row: zero-based row of that input.
        prompt: its text, or None.
        messages: its chat messages as JSON, or None.
        metadata: the input's other columns as a JSON object, or None.
        token_ids: (P,) int32 of the dataset's tokenizer, template included.
        template_arguments: further arguments of the chat template as a JSON object, or None.
    """

    index: int
    key: str
    source: str
    row: int
    prompt: str | None
    messages: str | None
    metadata: str | None
    token_ids: Int32Array
    template_arguments: str | None = None


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a run on disk.

    Attributes:
        root: the dataset's folder.
        entry: the file; each of its row groups is a task.
        counts: number of dropped prompts, by reason.
        inputs: the inputs, as the manifest lists them.
    """

    root: Path
    entry: FileEntry
    counts: dict[str, int]
    inputs: list[dict[str, Any]]

    def read(self, chunk: int) -> list[Prompt]:
        """The prompts of one task.

        Raises:
            IntegrityError: the file was damaged.
        """
        path = self.root / self.entry.path
        with open_parquet(path, self.entry.footer_sha256) as file:
            # Earlier versions wrote no template arguments.
            names = [name for name in _SCHEMA.names if name in file.schema_arrow.names]
            table = read_row_group(file, path, chunk, names).combine_chunks()
        columns = [to_rows(table.column(name).chunk(0)) for name in names]
        return [Prompt(*row) for row in zip(*columns, strict=True)]


def prepare_prompts(
    config: SampleConfig, encoder: Encoder, limits: Mapping[str, int]
) -> PromptFile:
    """Write the prompts of `config`, unless an earlier run did.

    Args:
        config: the run's settings.
        encoder: the dataset's tokenizer.
        limits: maximum number of tokens of a prompt, by sampler, where known.

    Raises:
        DataError: a row has no valid prompt, a template fails, a prompt is too long or occurs
            twice; names file and row. Or the folder holds the prompts of other inputs.
        IntegrityError: an input is damaged.
    """
    sources = prompt_sources(config.inputs, config.prompt_column, config.limits)
    with _bar("checking inputs", sources, config) as bar:
        digests = [source.sha256(bar.update) for source in sources]
    drops = config.overlong_prompts == "drop"
    systems = system_prompts(config.parsed())
    identity = sha256_json(
        {
            "version": _VERSION,
            "inputs": [[s.file_name, digest] for s, digest in zip(sources, digests, strict=True)],
            "settings": [getattr(config, name) for name in _SETTINGS],
            "limit": min(limits.values(), default=None) if drops else None,
            "tokenizer": tokenizer_info(encoder.tokenizer).fingerprint,
            **(limits_with_system(systems, limits) if drops else {}),
        }
    )
    log = TaskLog(local_path(config.output_dir), f"prompts-{identity[:12]}")
    _refuse_others(log)
    record = log.committed(_TASK)
    reader = _Reader(config, encoder, limits, sources)
    if record is None:
        entry = write_parquet(log.root, "prompts", _TASK, _SCHEMA, map(_table, reader.chunks()))
        if not entry.row_groups:
            raise DataError(
                "there is at least 1 prompt",
                received=", ".join(f"{k} {n}" for k, n in reader.counts.items()) or "none",
                remedy="check the inputs",
                file=sources[0].label,
            )
        counts = dict(sorted(reader.counts.items()))
        record = TaskRecord(stage=log.stage, task=_TASK, files=[entry], counts=counts)
        record = log.commit(record)
    elif systems or record.counts[_LONGEST] > min(limits.values(), default=2**63):
        for _ in reader.chunks():  # a sampler was added: raises for a prompt it cannot have
            pass
    inputs = [
        {"path": source.file_name, "sha256": digest}
        for source, digest in zip(sources, digests, strict=True)
    ]
    dropped = {name: n for name, n in record.counts.items() if name != _LONGEST}
    return PromptFile(log.root, record.files[0], dropped, inputs)


# Frozen: their values are hashed by position. A setting that is added later enters the identity
# under its own name, and only where it differs from its default; see `gvpo_offline.identity`.
_SETTINGS = (
    "prompt_column",
    "as_chat",
    "system_prompt",
    "duplicate_prompts",
    "overlong_prompts",
    "prompts_per_task",
)


def _refuse_others(log: TaskLog) -> None:
    commits = log.folder.parent
    names = [path.name for path in commits.iterdir()] if commits.exists() else []
    if any(name.startswith("prompts-") and name != log.stage for name in names):
        raise DataError(
            "the output folder is empty, or as an earlier run on these prompts left it",
            received="prompts of other inputs, settings or another tokenizer",
            remedy="repeat the earlier run, choose another output_dir, or remove the folder",
            file=log.root,
        )


def _bar(what: str, sources: Sequence[Source], config: SampleConfig) -> ProgressBar:
    total, quiet = sum(source.size for source in sources), not config.show_progress
    return ProgressBar(desc=what, total=total, unit="B", unit_scale=True, disable=quiet)


def _table(prompts: Sequence[Prompt]) -> pa.Table:
    values = {
        name: pa.array([getattr(p, name) for p in prompts], _SCHEMA.field(name).type)
        for name in _SCHEMA.names
        if name != "token_ids"
    }
    values["token_ids"] = list_array([p.token_ids for p in prompts], pa.int32())
    return pa.Table.from_pydict({n: values[n] for n in _SCHEMA.names}, schema=_SCHEMA)


@dataclass(frozen=True, slots=True)
class _Row:
    """A prompt before tokenisation, with its input and row."""

    source: Source
    number: int
    key: str
    prompt: str | None
    messages: str | None
    arguments: str | None
    metadata: str | None
    waiting: WaitingPrompt | None = None

    @property
    def place(self) -> dict[str, Any]:
        """The location of an error in the row, as keywords."""
        return {"file": self.source.label, "row": self.number}


class _Reader:
    """Reads the inputs twice: to find duplicate prompts, and to tokenise the prompts."""

    def __init__(
        self,
        config: SampleConfig,
        encoder: Encoder,
        limits: Mapping[str, int],
        sources: Sequence[Source],
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._limits = limits
        self._systems = system_prompts(config.parsed())
        self._sources = sources
        self._chat = ChatPrompts(config, encoder)
        self.counts: Counter[str] = Counter()  # dropped prompts, and tokens of the longest other

    def chunks(self) -> Iterator[list[Prompt]]:
        """The prompts, one task at a time."""
        keys = np.array(array("Q", (_short(row.key) for row in self._rows("finding duplicates"))))
        found, times = np.unique(keys, return_counts=True)
        rows = self._once(self._rows("reading prompts"), set(found[times > 1].tolist()))
        prompts = itertools.chain.from_iterable(
            map(self._tokenized, _chunked(rows, _TOKENIZED_AT_ONCE))
        )
        numbered = (replace(prompt, index=i) for i, prompt in enumerate(prompts))
        yield from _chunked(numbered, self._config.prompts_per_task)

    def _rows(self, what: str) -> Iterator[_Row]:
        with _bar(what, self._sources, self._config) as bar:
            for source in self._sources:
                for number, record in text_rows(source, None, bar.update):
                    try:
                        yield self._parsed(source, number, record)
                    except DataError as error:
                        raise with_location(
                            error, file=source.label, row=number
                        ) from error.__cause__
                source.check_unchanged()

    def _parsed(self, source: Source, number: int, record: Mapping[str, Any]) -> _Row:
        name = self._config.prompt_column
        found = value_at(record, name)
        if found is MISSING:
            raise DataError(
                f"a row has the column {name!r} that prompt_column names",
                received=f"the columns {', '.join(record)}",
                remedy="set prompt_column to the column that holds the prompt",
            )
        text, messages = prompt_of(found)
        if not (text or messages):
            raise DataError("a prompt is not empty", received=repr(text), remedy="remove the row")
        text, messages = self._chat.prompt(text, messages, source.label, number)
        refuse_text(self._systems, text)
        rest = {column: value for column, value in record.items() if column != name}
        arguments = template_arguments(record)
        if arguments and messages is None:
            raise DataError(
                "tools and chat_template_kwargs belong to a prompt of chat messages",
                received=f"{arguments} beside the text {text!r}",
                remedy="set as_chat: true, or remove the columns",
            )
        bare = Fragment(text, messages, None, [], None, None, [], [])
        bare.template_arguments = arguments
        return _Row(
            source=source,
            number=number,
            key=prompt_key(bare),
            prompt=text,
            messages=messages,
            arguments=arguments,
            metadata=json.dumps(rest, default=plain, allow_nan=True) if rest else None,
            waiting=record if isinstance(record, WaitingPrompt) else None,
        )

    def _once(self, rows: Iterator[_Row], doubled: set[int]) -> Iterator[_Row]:
        """The rows without duplicate prompts."""
        seen: dict[str, _Row] = {}
        for row in rows:
            first = seen.get(row.key)
            if first is None:
                if _short(row.key) in doubled:
                    seen[row.key] = row
                yield row
            elif self._config.duplicate_prompts == "error":
                raise DataError(
                    "a prompt occurs once, since responses to one prompt are one group",
                    received=f"the prompt of {first.source.label}, row {first.number}, again",
                    remedy="remove the row, or drop such rows (duplicate_prompts: drop)",
                    **row.place,
                )
            else:
                self.counts["dropped_duplicate_prompts"] += 1

    def _tokenized(self, rows: Sequence[_Row]) -> list[Prompt]:
        texts, chats = [r for r in rows if r.messages is None], [r for r in rows if r.messages]
        if chats and not self._encoder.tokenizer.chat_template:
            raise ConfigError(
                "chat messages are rendered with a chat template",
                received="a tokenizer without one",
                remedy="set chat_template to the path of a Jinja template",
                **chats[0].place,
            )
        rendered = []
        for row in chats:
            try:
                rendered.append(self._encoder.render(row.messages or "", row.arguments))
            except DataError as error:
                raise with_location(
                    error, file=row.source.label, row=row.number
                ) from error.__cause__
        found = self._encoder.prompts([r.prompt or "" for r in texts])
        found += self._encoder.rendered(rendered)
        ids = {id(row): own for row, own in zip([*texts, *chats], found, strict=True)}
        return [self._prompt(row, ids[id(row)]) for row in rows if self._fits(row, ids[id(row)])]

    def _prompt(self, row: _Row, ids: Int32Array) -> Prompt:
        file, number = row.source.file_name, row.number
        if row.waiting is not None:
            try:
                row.waiting.check(ids)
            except DataError as error:
                raise with_location(error, file=row.source.label, row=number) from None
        return Prompt(
            *(0, row.key, file, number, row.prompt, row.messages, row.metadata, ids, row.arguments)
        )

    def _fits(self, row: _Row, ids: Int32Array) -> bool:
        if not len(ids):
            raise DataError("a prompt needs at least 1 token", received=row.prompt, **row.place)
        found = PlainPrompt(row.messages, row.arguments, ids, row.place)
        lengths = prompt_lengths(self._systems, self._limits, found, self._encoder)
        tight = [name for name, limit in self._limits.items() if lengths[name] > limit]
        if not tight:
            self.counts[_LONGEST] = max(self.counts[_LONGEST], len(ids))
            return True
        if self._config.overlong_prompts == "error":
            limit = self._limits[tight[0]]
            raise DataError(
                f"a prompt leaves room for max_new_tokens: for sampler {tight[0]!r} it has at most "
                f"{limit} tokens",
                received=f"{lengths[tight[0]]} tokens: {row.prompt or row.messages}",
                remedy="shorten the prompt, lower max_new_tokens, or drop such prompts "
                "(overlong_prompts: drop)",
                **row.place,
            )
        self.counts["dropped_overlong_prompts"] += 1
        return False


def _short(key: str) -> int:
    return int(key[:16], 16)


def _chunked(items: Iterator[T], size: int) -> Iterator[list[T]]:
    return iter(lambda: list(itertools.islice(items, size)), [])
