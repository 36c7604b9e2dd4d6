"""The incomplete groups of a dataset as prompts to sample more responses to.

An input of `sample` that is the folder of a dataset stands for its incomplete groups. The new
responses are a dataset of their own, which `merge` joins with the first.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group, Int32Array
from gvpo_offline.importing.sources.files import Advance, Source
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.importing.sources.rows import Record, Row
from gvpo_offline.limits import Limits
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.incomplete import incomplete_dataset
from gvpo_offline.store.location import is_url, local_path
from gvpo_offline.store.manifest import load_manifest, manifest_versions

_COLUMNS = (
    *("prompt", "messages", "template_arguments", "metadata"),
    *("prompt_token_ids", "response_token_ids"),
)


class WaitingPrompts(Source):
    """The prompts of a dataset's incomplete groups.

    A row has the prompt under `column`, and beside it what the group's metadata holds.

    Args:
        label: the dataset as the user named it.
        dataset: its incomplete groups.
        column: name of the prompt's column.
    """

    def __init__(self, label: str, dataset: GroupDataset, column: str) -> None:
        files = [dataset.folder / entry.path for entry in dataset.manifest.groups]
        super().__init__(label, Path(label).name, files)
        self._dataset = dataset
        self._column = column

    def rows(self, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
        """See `Source.rows`; a row is a `WaitingPrompt`."""
        number = itertools.count()
        sizes = self._dataset.row_group_sizes
        for row_group in range(self._dataset.n_row_groups):
            for group in self._dataset.groups(row_group, _COLUMNS):
                row = next(number)
                yield row, WaitingPrompt(self._record(group, row), group.prompt_token_ids)
            advance(int(self.size * sizes[row_group] // sizes.sum()))

    def _record(self, group: Group, row: int) -> Record:
        prompt: Any = group.prompt if group.messages is None else json.loads(group.messages)
        if prompt is None:
            raise DataError(
                "the prompt of an incomplete group has a text or messages, to sample from",
                received="token ids alone",
                remedy="import the log with its prompts as text (columns.prompt)",
                file=self.label,
                row=row,
                group=group.group_id,
            )
        beside = json.loads(group.metadata) if group.metadata else {}
        if group.template_arguments:
            arguments = json.loads(group.template_arguments)
            beside["tools"] = arguments.pop("tools", None)
            beside["chat_template_kwargs"] = arguments
        return {**beside, self._column: prompt}


class WaitingPrompt(dict[str, Any]):
    """A row of `WaitingPrompts`.

    Attributes:
        token_ids: (P,) int32, the ids that the dataset has for the prompt.
    """

    def __init__(self, record: Record, token_ids: Int32Array) -> None:
        super().__init__(record)
        self.token_ids = token_ids

    def check(self, found: Int32Array) -> None:
        """Raise DataError unless the prompt was tokenised as in the dataset, for the merge."""
        if not np.array_equal(found, self.token_ids):
            raise DataError(
                "the prompt of an incomplete group has the token ids that its dataset has, so that "
                "a merge joins the responses",
                received=f"{len(found)} ids that differ from the {len(self.token_ids)} there",
                remedy="set the tokenizer and chat_template of that dataset, and neither as_chat "
                "nor system_prompt",
            )


def prompt_sources(
    inputs: Sequence[str] | str, column: str, limits: Limits | None = None
) -> list[Source]:
    """The inputs of `sample`: as `find_sources`, and folders of datasets.

    Args:
        inputs: paths, globs, hub names, and folders of datasets with incomplete groups.
        column: name of the prompt's column.
        limits: as for `find_sources`.

    Raises:
        DataError: a dataset has no incomplete groups; and as `find_sources`.
    """
    names = [inputs] if isinstance(inputs, str) else list(inputs)
    found: list[Source] = []
    for own, several in itertools.groupby(names, _is_dataset):
        if own:
            found += [_waiting(name, column) for name in dict.fromkeys(several)]
        else:
            found += find_sources(list(several), limits=limits)
    return found


def _is_dataset(name: str) -> bool:
    return not is_url(name) and bool(manifest_versions(local_path(name).expanduser()))


def _waiting(name: str, column: str) -> WaitingPrompts:
    root = local_path(name).expanduser()
    dataset = incomplete_dataset(root, load_manifest(root))
    if dataset is None:
        raise DataError(
            "a dataset that is an input of `sample` has incomplete groups, whose prompts are taken",
            received="none",
            remedy="import with singletons: keep, or give a file of prompts",
            file=root,
        )
    dataset.verify()
    return WaitingPrompts(name, dataset, column)
