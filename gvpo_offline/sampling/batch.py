"""OpenAI batch files: requests to hand in, results to read; in between, nothing runs here.

A run writes request files for all that is missing. Once a later run is told of result files, it
reads them; what failed there, or is not in them, is missing still, and asked for in new files.
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
from gvpo_offline.openai.answer import BadAnswerError
from gvpo_offline.sampling.answers import (
    is_chat,
    read_answer,
    request_body,
)
from gvpo_offline.sampling.log import Sample
from gvpo_offline.sampling.settings import BatchSettings
from gvpo_offline.sampling.stage import SampleRequest, SamplerInfo
from gvpo_offline.store.commit import write_hashed

_CAUSE_CHARACTERS = 200


def custom_id(wanted: SampleRequest) -> str:
    """What names a request in both files: the prompt's hash and the response's number."""
    return f"{wanted.prompt.key[:24]}-{wanted.number}"


def write_requests(
    folder: Path, settings: BatchSettings, wanted: Iterable[SampleRequest]
) -> list[Path]:
    """Write request files, named by their content.

    Raises:
        ConfigError: a prompt does not go with the settings' api.
        StorageError: no room.
    """
    paths: list[Path] = []
    lines = (_request(settings, each) for each in wanted)
    for head in lines:
        piece = itertools.chain([head], itertools.islice(lines, settings.requests_per_file - 1))

        def write(path: Path, piece: Iterable[str] = piece) -> None:
            with path.open("w", encoding="utf-8") as file:
                file.writelines(piece)

        paths.append(write_hashed(folder, f"requests-{len(paths):05d}", ".jsonl", write)[0])
    return paths


def _request(settings: BatchSettings, wanted: SampleRequest) -> str:
    endpoint = "chat/completions" if is_chat(settings, wanted.prompt) else "completions"
    request = {
        "custom_id": custom_id(wanted),
        "method": "POST",
        "url": f"/v1/{endpoint}",
        "body": request_body(settings, [wanted]),
    }
    return json.dumps(request, ensure_ascii=False) + "\n"


class BatchSampler:
    """Looks responses up in result files; see `Sampler`."""

    def __init__(self, settings: BatchSettings) -> None:
        self._settings = settings
        self._results: _Results | None = None

    def facts(self) -> SamplerInfo:
        """The context, as the settings say."""
        return SamplerInfo(self._settings.context_length)

    def start(self) -> None:
        """Find out where in the result files each answer is.

        Raises:
            DataError: a file does not exist, or a line is no result.
        """
        self._results = _Results(self._settings.results)

    def sample(self, wanted: Sequence[SampleRequest]) -> list[Sample]:
        """The responses that the files have, and why they have not the others."""
        return [self._look_up(each) for each in wanted]

    def _look_up(self, wanted: SampleRequest) -> Sample:
        assert self._results is not None
        cause = "not in the result files"
        for result in self._results.lines(custom_id(wanted)):
            try:
                return self._read(result, wanted)
            except BadAnswerError as error:
                cause = str(error)[:_CAUSE_CHARACTERS]
        return wanted.failed(cause)

    def _read(self, result: dict[str, Any], wanted: SampleRequest) -> Sample:
        response = result.get("response") or {}
        body, status = response.get("body"), response.get("status_code")
        if result.get("error") or status != 200:
            problem = result.get("error") or (body or {}).get("error") or body
            raise BadAnswerError(f"HTTP {status}: {json.dumps(problem)}")
        sample = read_answer(self._settings, body, [wanted])[0]
        if sample.error is not None:
            raise BadAnswerError(sample.error)
        return sample


class _Results:
    """Result files by custom_id: 20 bytes of memory a line."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._paths: list[Path] = []
        keys, places = array("Q"), array("q")
        for source in find_sources(patterns):
            if not isinstance(source, JsonLines) or source.label.endswith(".gz"):
                raise DataError(
                    "a result file is JSON lines, not compressed", received=source.label
                )
            for offset, name in _ids(source.files[0]):
                keys.append(text_key(name))
                places.extend((len(self._paths), offset))
            self._paths.append(source.files[0])
        self._keys = np.array(keys, np.uint64)
        self._places = np.array(places, np.int64).reshape(-1, 2)
        # Stable: of several results the one that stands first is looked at first.
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


def _ids(path: Path) -> Iterator[tuple[int, str]]:
    """Where each line of a result file begins, and whose it is."""
    offset = 0
    with path.open("rb") as file:
        for row, line in enumerate(file):
            if not line.isspace():
                try:
                    record = json.loads(line)
                    name = record["custom_id"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        "a line of a result file is a JSON object with a custom_id",
                        received=line[:80].decode(errors="replace"),
                        remedy="name the files that the batch gave back (results)",
                        file=path,
                        row=row,
                    ) from error
                yield offset, str(name)
            offset += len(line)
