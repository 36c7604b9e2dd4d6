"""Groups that are being built: merged from their fragments, and dropped if they break a rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gvpo_offline.errors import DataError
from gvpo_offline.group import BoolArray, Int32Array
from gvpo_offline.importing.broken_rows import BrokenRows
from gvpo_offline.importing.fragment import Fragment, with_location
from gvpo_offline.importing.regroup import KeyedFragment
from gvpo_offline.importing.settings import ImportConfig


@dataclass(frozen=True)
class InputNames:
    """Names of an input: in messages, in `Group.source`, and as the default sampler."""

    label: str
    file_name: str
    sampler: str


@dataclass(slots=True)
class DraftResponse:
    """One response of a group that is being built."""

    fragment: Fragment
    text: str | None
    ids: Int32Array | None
    mask: BoolArray | None
    reward: float | None
    components: list[float | None]
    sampler: str
    truncated: bool
    response_id: str | None
    sampler_logprob: float | None


@dataclass(slots=True)
class Draft:
    """A group that is being built."""

    group_id: str
    first: Fragment
    prompt_ids: Int32Array | None
    responses: list[DraftResponse]
    logged: int
    reduced: bool = False


class Merger:
    """Merges the fragments of a group.

    Args:
        config: the import's settings.
        inputs: names of the inputs; `Fragment.file` is an index into them.
        components: names of all reward components in the log.
    """

    def __init__(
        self, config: ImportConfig, inputs: Sequence[InputNames], components: Sequence[str]
    ) -> None:
        self._config = config
        self._inputs = inputs
        self._components = components

    def located(self, draft: Draft, fragment: Fragment, error: DataError) -> DataError:
        """`error` with the file and row of `fragment` and the group added where it has none."""
        label = self._inputs[fragment.file].label
        return with_location(error, file=label, row=fragment.row, group=draft.group_id)

    def _where(self, fragment: Fragment) -> str:
        return f"{self._inputs[fragment.file].label}, row {fragment.row}"

    def merge(self, spilled: Sequence[KeyedFragment]) -> Draft:
        """The group of some fragments, in their order.

        Raises:
            DataError: the fragments have different prompts, or two responses have one id.
        """
        first, first_key = spilled[0]
        assert first.group_id is not None
        with_ids = next((f for f, _ in spilled if f.prompt_token_ids is not None), None)
        prompt_ids = None if with_ids is None else with_ids.prompt_token_ids
        draft = Draft(first.group_id, first, prompt_ids, [], sum(f.size for f, _ in spilled))
        for fragment, key in spilled:
            if key != first_key:
                raise self.located(
                    draft,
                    fragment,
                    DataError(
                        "all rows of a group have the same prompt",
                        received=f"a prompt that differs from that of {self._where(first)}: "
                        f"{fragment.messages or fragment.prompt!r} "
                        f"instead of {first.messages or first.prompt!r}",
                        remedy="give different prompts different group ids, or unset "
                        "columns.group_id to group by the prompt",
                    ),
                )
            ids = fragment.prompt_token_ids
            if ids is not None and prompt_ids is not None and not np.array_equal(ids, prompt_ids):
                assert with_ids is not None
                raise self.located(
                    draft,
                    fragment,
                    DataError(
                        "all rows of a group have the same prompt",
                        received="prompt token ids that differ from those of "
                        f"{self._where(with_ids)}",
                        remedy="give different prompts different group ids, or unset "
                        "columns.prompt so that prompts are compared by their ids",
                    ),
                )
            draft.responses += self.responses(fragment)
        self._check_response_ids(draft)
        return draft

    def responses(self, fragment: Fragment) -> list[DraftResponse]:
        """The responses of a fragment."""
        default = self._config.sampler or self._inputs[fragment.file].sampler
        held = fragment.components or {}
        parts = [held.get(name) for name in self._components]
        return [
            DraftResponse(
                fragment=fragment,
                text=text,
                ids=fragment.ids_of(i),
                mask=fragment.mask_of(i),
                reward=None if fragment.rewards is None else fragment.rewards[i],
                components=[None if part is None else part[i] for part in parts],
                sampler=fragment.samplers[i] or default,
                truncated=bool(fragment.truncated[i]),
                response_id=None if fragment.response_ids is None else fragment.response_ids[i],
                sampler_logprob=fragment.sampler_logprobs[i] if fragment.sampler_logprobs else None,
            )
            for i, text in enumerate(fragment.responses)
        ]

    def _check_response_ids(self, draft: Draft) -> None:
        seen: dict[str, Fragment] = {}
        for response in draft.responses:
            if response.response_id is None:
                continue
            other = seen.get(response.response_id)
            if other is not None:
                raise self.located(
                    draft,
                    response.fragment,
                    DataError(
                        "response ids are unique within a group",
                        received=f"{response.response_id!r}, which {self._where(other)} also has",
                        remedy="remove the duplicate rows, or leave columns.response_id out",
                    ),
                )
            seen[response.response_id] = response.fragment


class Refusals:
    """Drops the rows and groups that break a rule, or raises an error if `on_error` is stop.

    Args:
        merger: names the inputs of fragments.
        broken: collects what is dropped.
    """

    def __init__(self, merger: Merger, broken: BrokenRows) -> None:
        self._merger = merger
        self._broken = broken

    def row(self, draft: Draft, fragment: Fragment, error: DataError) -> None:
        """Drop a row with all of its responses from its group.

        Raises:
            DataError: `error`, if `on_error` is stop; or too many rows and groups are broken.
        """
        gone = [r for r in draft.responses if r.fragment is fragment]
        self._refuse(draft, fragment, error, gone, "row")
        draft.responses = [r for r in draft.responses if r.fragment is not fragment]
        draft.reduced = True
        if draft.first is fragment and draft.responses:
            draft.first = draft.responses[0].fragment

    def group(self, draft: Draft, error: DataError) -> None:
        """Drop a group with all of its responses; raises as `row` does."""
        self._refuse(draft, draft.first, error, draft.responses, "group")

    def _refuse(
        self,
        draft: Draft,
        fragment: Fragment,
        error: DataError,
        gone: Sequence[DraftResponse],
        what: Literal["row", "group"],
    ) -> None:
        located = self._merger.located(draft, fragment, error)
        if not self._broken.drops:
            raise located from error.__cause__
        self._broken.add(located, samplers=Counter(r.sampler for r in gone), dropped=what)
