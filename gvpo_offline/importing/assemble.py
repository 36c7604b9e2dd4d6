"""Builds groups from their fragments: merges, tokenises and filters by the settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gvpo_offline.errors import DataError
from gvpo_offline.group import BoolArray, Group, Int32Array
from gvpo_offline.importing.encode import Encoder
from gvpo_offline.importing.fragment import Fragment, with_location
from gvpo_offline.importing.regroup import KeyedFragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.rules import MIN_GROUP_SIZE


@dataclass(frozen=True)
class InputNames:
    """Names of an input: in messages, in `Group.source`, and as the default sampler."""

    label: str
    file_name: str
    sampler: str


@dataclass(slots=True)
class _Response:
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
class _Draft:
    """A group that is being built."""

    group_id: str
    first: Fragment
    prompt_ids: Int32Array | None
    responses: list[_Response]
    logged: int


class Assembler:
    """Builds groups from fragments.

    Args:
        config: the import's settings.
        encoder: the tokenizer, or None if every fragment has token ids.
        inputs: names of the inputs; `Fragment.file` is an index into them.
        components: names of all reward components in the log, in the order of the rows of
            `Group.components`. A component that a fragment lacks is NaN for its responses.

    Attributes:
        counts: numbers of dropped and cut responses and groups so far, by reason.
    """

    def __init__(
        self,
        config: ImportConfig,
        encoder: Encoder | None,
        inputs: Sequence[InputNames],
        components: Sequence[str] = (),
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._inputs = inputs
        self._components = components
        self.counts: Counter[str] = Counter()

    def groups(self, fragments: Sequence[Sequence[KeyedFragment]]) -> list[Group]:
        """Build one group per list of fragments, in order; the settings may drop some.

        With `singletons: keep` some have a single response.

        Raises:
            DataError: a group breaks a rule, or the settings say to stop; names file, row and
                group.
        """
        drafts = [self._merge(group) for group in fragments]
        self._tokenize_prompts([draft for draft in drafts if draft.prompt_ids is None])
        self._tokenize_responses([r for draft in drafts for r in draft.responses])
        kept: list[Group] = []
        for draft in drafts:
            self._drop_unrewarded(draft)
            self._drop_empty(draft)
            if self._fits_max_length(draft) and self._has_min_size(draft):
                kept.append(self._finish(draft))
        return kept

    def _error(self, draft: _Draft, fragment: Fragment, error: DataError) -> DataError:
        label = self._inputs[fragment.file].label
        return with_location(error, file=label, row=fragment.row, group=draft.group_id)

    def _where(self, fragment: Fragment) -> str:
        return f"{self._inputs[fragment.file].label}, row {fragment.row}"

    def _merge(self, spilled: Sequence[KeyedFragment]) -> _Draft:
        first, first_key = spilled[0]
        assert first.group_id is not None
        with_ids = next((f for f, _ in spilled if f.prompt_token_ids is not None), None)
        prompt_ids = None if with_ids is None else with_ids.prompt_token_ids
        draft = _Draft(first.group_id, first, prompt_ids, [], sum(f.size for f, _ in spilled))
        for fragment, key in spilled:
            if key != first_key:
                raise self._error(
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
                raise self._error(
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
            draft.responses += self._responses(fragment)
        self._check_response_ids(draft)
        return draft

    def _responses(self, fragment: Fragment) -> list[_Response]:
        default = self._config.sampler or self._inputs[fragment.file].sampler
        held = fragment.components or {}
        parts = [held.get(name) for name in self._components]
        return [
            _Response(
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

    def _check_response_ids(self, draft: _Draft) -> None:
        seen: dict[str, Fragment] = {}
        for response in draft.responses:
            if response.response_id is None:
                continue
            other = seen.get(response.response_id)
            if other is not None:
                raise self._error(
                    draft,
                    response.fragment,
                    DataError(
                        "response ids are unique within a group",
                        received=f"{response.response_id!r}, which {self._where(other)} also has",
                        remedy="remove the duplicate rows, or leave columns.response_id out",
                    ),
                )
            seen[response.response_id] = response.fragment

    def _tokenize_prompts(self, drafts: Sequence[_Draft]) -> None:
        if not drafts:
            return
        assert self._encoder is not None  # checked by TokenizerRequirements
        chats = [draft for draft in drafts if draft.first.messages is not None]
        texts = [draft for draft in drafts if draft.first.messages is None]
        rendered = []
        for draft in chats:
            try:
                rendered.append(self._encoder.render(draft.first.messages or ""))
            except DataError as error:
                raise self._error(draft, draft.first, error) from error.__cause__
        for draft, ids in zip(chats, self._encoder.rendered(rendered), strict=True):
            draft.prompt_ids = ids
        prompts = [draft.first.prompt or "" for draft in texts]
        for draft, ids in zip(texts, self._encoder.prompts(prompts), strict=True):
            draft.prompt_ids = ids
        for draft in drafts:
            if draft.prompt_ids is None or not len(draft.prompt_ids):
                raise self._error(
                    draft,
                    draft.first,
                    DataError(
                        "a prompt needs at least 1 token",
                        received=draft.first.messages or draft.first.prompt,
                        remedy="use a tokenizer that knows these characters",
                    ),
                )

    def _tokenize_responses(self, responses: Sequence[_Response]) -> None:
        texts = [r for r in responses if r.ids is None]
        if not texts:
            return
        assert self._encoder is not None
        bodies = self._encoder.responses([r.text or "" for r in texts])
        for response, body in zip(texts, bodies, strict=True):
            bare = not len(body)
            if response.truncated or (bare and self._config.empty_responses != "keep"):
                response.ids = body
            else:
                response.ids = self._encoder.with_end_token(body)

    def _drop(self, draft: _Draft, what: str, keep: Callable[[_Response], bool]) -> None:
        before = len(draft.responses)
        draft.responses = [response for response in draft.responses if keep(response)]
        self.counts[what] += before - len(draft.responses)

    def _drop_unrewarded(self, draft: _Draft) -> None:
        if draft.first.rewards is not None:  # then every row of the log has rewards
            self._drop(draft, "dropped_unrewarded_responses", lambda r: r.reward is not None)

    def _drop_empty(self, draft: _Draft) -> None:
        empty = next((r for r in draft.responses if not _length(r)), None)
        if empty is None:
            return
        if self._config.empty_responses != "drop":
            cut = ", cut before its first token" if empty.truncated else ""
            raise self._error(
                draft,
                empty.fragment,
                DataError(
                    "a response needs at least 1 token",
                    received=f"{'no ids' if empty.text is None else repr(empty.text)}{cut}",
                    remedy="drop such responses (empty_responses: drop)",
                ),
            )
        self._drop(draft, "dropped_empty_responses", lambda r: _length(r) > 0)

    def _fits_max_length(self, draft: _Draft) -> bool:
        """Apply max_length to the responses; False if the group is dropped."""
        limit = self._config.max_length
        if limit is None or draft.prompt_ids is None:
            return True
        prompt = len(draft.prompt_ids)
        room = limit - prompt
        over = next((r for r in draft.responses if _length(r) > room), None)
        if over is None:
            return True
        if self._config.overlong == "error":
            raise self._error(
                draft,
                over.fragment,
                DataError(
                    f"prompt and response have at most {limit} tokens (max_length)",
                    received=f"{prompt + _length(over)} ({prompt} + {_length(over)})",
                    remedy="raise max_length, or choose overlong: drop or overlong: truncate",
                ),
            )
        if room < 1:
            self.counts["dropped_overlong_prompts"] += 1
            self.counts["dropped_overlong_responses"] += len(draft.responses)
            return False
        if self._config.overlong == "truncate":
            self._cut(draft, room)
        self._drop(draft, "dropped_overlong_responses", lambda r: _length(r) <= room)
        return True

    def _cut(self, draft: _Draft, room: int) -> None:
        for response in draft.responses:
            if response.ids is None or len(response.ids) <= room:
                continue
            mask = None if response.mask is None else response.mask[:room]
            if mask is not None and not mask.any():
                continue  # no token of the policy is left: the caller drops it as overlong
            response.ids, response.mask, response.truncated = response.ids[:room], mask, True
            response.sampler_logprob = None  # the logged one is of the uncut response
            self.counts["cut_overlong_responses"] += 1

    def _has_min_size(self, draft: _Draft) -> bool:
        """Apply the minimum group size; False if the group is dropped.

        With `singletons: keep` a group of one response is kept; the importer stores it apart.
        """
        k = len(draft.responses)
        if k >= MIN_GROUP_SIZE:
            return True
        if k == 0:
            self.counts["dropped_groups_without_responses"] += 1
            return False
        if self._config.singletons == "keep":
            return True
        if self._config.singletons == "drop":
            self.counts["dropped_singletons"] += 1
            return False
        left = "" if draft.logged == k else f" of {draft.logged} that were logged"
        raise self._error(
            draft,
            draft.first,
            DataError(
                f"a group needs at least {MIN_GROUP_SIZE} responses",
                received=f"{k}{left} for the prompt {draft.first.messages or draft.first.prompt!r}",
                remedy="add responses for this prompt, drop such groups (singletons: drop), or "
                "keep them as incomplete groups for a later merge (singletons: keep)",
            ),
        )

    def _finish(self, draft: _Draft) -> Group:
        first, responses = draft.first, draft.responses
        ids = tuple(r.ids for r in responses if r.ids is not None)
        assert len(ids) == len(responses)
        assert draft.prompt_ids is not None
        if len(responses) >= MIN_GROUP_SIZE:  # as all counts of responses
            self.counts["truncated_responses"] += sum(r.truncated for r in responses)
        masks = None
        if any(r.mask is not None for r in responses):
            masks = tuple(
                np.ones(_length(r), bool) if r.mask is None else r.mask for r in responses
            )
        texts = tuple(r.text for r in responses if r.text is not None)
        response_ids = tuple(r.response_id for r in responses if r.response_id is not None)
        rewards = [r.reward for r in responses if r.reward is not None]
        logprobs = [r.sampler_logprob for r in responses if r.sampler_logprob is not None]
        source = self._config.source or first.source or self._inputs[first.file].file_name
        return Group(
            group_id=draft.group_id,
            prompt_token_ids=draft.prompt_ids,
            response_token_ids=ids,
            samplers=tuple(r.sampler for r in responses),
            truncated=tuple(r.truncated for r in responses),
            loss_mask=masks,
            rewards=np.array(rewards) if rewards else None,
            # np.array turns None into NaN.
            components=np.array([r.components for r in responses], np.float64).T
            if self._components
            else None,
            source=source,
            prompt=first.prompt,
            messages=first.messages,
            # Texts (and ids) are kept only if every response has one.
            responses=texts if len(texts) == len(responses) else None,
            response_ids=response_ids if len(response_ids) == len(responses) else None,
            metadata=first.metadata,
            sampler_seq_logprobs=np.array(logprobs) if len(logprobs) == len(responses) else None,
        )


def _length(response: _Response) -> int:
    return 0 if response.ids is None else len(response.ids)
