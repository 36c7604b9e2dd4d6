"""The sampler of `kind: openai_batch`: writes request files and reads result files.

A run writes request files for all missing responses; the user uploads them and names the downloaded
result files in a later run, which reads them. Responses that failed or are absent there are
requested again, in new files.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_offline.errors import DataError
from gvpo_offline.hashing import text_key
from gvpo_offline.importing.sources.files import JsonLines
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.limits import Limits, bounded_lines, parse_json
from gvpo_offline.openai.answer import BadAnswerError, result_body, valid
from gvpo_offline.sampling.answers import endpoint, read_answer, request_body
from gvpo_offline.sampling.log import Sample
from gvpo_offline.sampling.settings import BatchSettings
from gvpo_offline.sampling.stage import SampleRequest, SamplerInfo
from gvpo_offline.store.commit import write_hashed

_CAUSE_CHARACTERS = 200


def custom_id(request: SampleRequest) -> str:
    """The name of a request in both files: the prompt's hash and the response's number."""
    return f"{request.prompt.key[:24]}-{request.number}"


def write_requests(
    folder: Path, settings: BatchSettings, requests: Iterable[SampleRequest]
) -> list[Path]:
    """Write request files, named by their content.

    Raises:
        ConfigError: a prompt does not fit the settings' api.
        StorageError: no room.
    """
    paths: list[Path] = []
    lines = (_request_line(settings, request) for request in requests)
    for head in lines:
        chunk = itertools.chain([head], itertools.islice(lines, settings.requests_per_file - 1))

        def write(path: Path, chunk: Iterable[str] = chunk) -> None:
            with path.open("w", encoding="utf-8") as file:
                file.writelines(chunk)

        paths.append(write_hashed(folder, f"requests-{len(paths):05d}", ".jsonl", write)[0])
    return paths


def _request_line(settings: BatchSettings, request: SampleRequest) -> str:
    line = {
        "custom_id": custom_id(request),
        "method": "POST",
        "url": f"/v1/{endpoint(settings, request.prompt)}",
        "body": request_body(settings, [request]),
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


class BatchSampler:
    """Looks responses up in result files; see `Sampler`."""

    def __init__(self, settings: BatchSettings, limits: Limits | None = None) -> None:
        self._settings = settings
        self._limits = limits or Limits()
        self._results: _ResultIndex | None = None

    def info(self) -> SamplerInfo:
        """The context length that the settings give."""
        return SamplerInfo(self._settings.context_length)

    def check(self) -> None:
        """Check that the result files exist, as `start` does."""
        find_sources(self._settings.results, limits=self._limits)

    def start(self) -> None:
        """Index the result files.

        Raises:
            DataError: a file does not exist, or a line is not a result.
        """
        self._results = _ResultIndex(self._settings.results, self._limits)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """The responses in the files, and the causes of failure of the others."""
        return [self._look_up(request) for request in requests]

    def _look_up(self, request: SampleRequest) -> Sample:
        assert self._results is not None
        sample = request.failed("not in the result files")
        for result in self._results.lines(custom_id(request)):
            try:
                (sample,) = read_answer(self._settings, result_body(result), [request])
            except BadAnswerError as error:
                sample = request.failed(str(error)[:_CAUSE_CHARACTERS])
            if sample.error is None:
                break
        return sample


class _ResultIndex:
    """The position of each line of the result files by custom_id, in 24 bytes of memory a line."""

    def __init__(self, patterns: Sequence[str], limits: Limits) -> None:
        self._paths: list[Path] = []
        keys, places = array("Q"), array("q")
        for source in find_sources(patterns, limits=limits):
            if not isinstance(source, JsonLines) or source.label.endswith(".gz"):
                raise DataError(
                    "a result file is JSON lines, not compressed", received=source.label
                )
            for offset, name in _custom_ids(source.files[0], limits):
                keys.append(text_key(name))
                places.extend((len(self._paths), offset))
            self._paths.append(source.files[0])
        self._keys = np.array(keys, np.uint64)
        self._places = np.array(places, np.int64).reshape(-1, 2)
        # Stable: several results of one request stay in the order of the files.
        order = np.argsort(self._keys, kind="stable")
        self._keys, self._places = self._keys[order], self._places[order]

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The results of one request."""
        key = np.uint64(text_key(name))
        first, last = (int(np.searchsorted(self._keys, key, side)) for side in ("left", "right"))
        for number, offset in self._places[first:last].tolist():
            with self._paths[number].open("rb") as file:
                file.seek(offset)
                yield json.loads(file.readline())


def _custom_ids(path: Path, limits: Limits) -> Iterator[tuple[int, str]]:
    """The byte offset and the custom_id of each line of a result file."""
    offset = 0
    with path.open("rb") as file:
        for row, line in enumerate(bounded_lines(file, limits.row_bytes, path)):
            if not line.isspace():
                try:
                    name = parse_json(line, nesting=limits.nesting)["custom_id"]
                except DataError as error:
                    raise error.replaced(file=path, row=row) from error
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        "a line of a result file is a JSON object with a custom_id",
                        received=line[:80].decode(errors="replace"),
                        remedy="name the result files of the batch (results)",
                        file=path,
                        row=row,
                    ) from error
                yield offset, valid(str(name))
            offset += len(line)
