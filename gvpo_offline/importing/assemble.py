"""Builds groups from their fragments: merges, tokenises and filters by the settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np

from gvpo_offline.chat.encoder import Encoder
from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.importing.broken_rows import BrokenRows
from gvpo_offline.importing.draft import Draft, DraftResponse, InputNames
from gvpo_offline.importing.fragment import Fragment, with_location
from gvpo_offline.importing.padding import Padding
from gvpo_offline.importing.refusals import Refusals
from gvpo_offline.importing.regroup import KeyedFragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.tally import Tally
from gvpo_offline.importing.tokenization import tokenize
from gvpo_offline.rules import MIN_GROUP_SIZE, check_group


class Assembler:
    """Builds groups from fragments.

    Args:
        config: the import's settings.
        encoder: the tokenizer, or None if every fragment has token ids.
        inputs: names of the inputs; `Fragment.file` is an index into them.
        components: names of all reward components in the log, in the order of the rows of
            `Group.components`. A component that a fragment lacks is NaN for its responses.
        tally: counts what becomes of the responses; a new one by default.
        reduced: ids of the groups of broken rows that the first pass dropped.

    Attributes:
        counts: numbers of dropped and cut responses and groups so far, by reason.
        broken: the rows and groups that were dropped because they break a rule.
    """

    def __init__(
        self,
        config: ImportConfig,
        encoder: Encoder | None,
        inputs: Sequence[InputNames],
        components: Sequence[str] = (),
        *,
        tally: Tally | None = None,
        reduced: Collection[str] = (),
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._padding = (
            None
            if encoder is None
            else Padding(encoder.all_end_ids, encoder.tokenizer.pad_token_id)
        )
        self._inputs = inputs
        self._components = components
        self._tally = tally or Tally()
        self.counts: Counter[str] = self._tally.counts
        self.broken = BrokenRows(config)
        self._refusals = Refusals(self.broken, self._error)
        self._reduced = reduced

    def groups(self, fragments: Sequence[Sequence[KeyedFragment]]) -> list[Group]:
        """Build one group per list of fragments, in order; the settings may drop some.

        With `singletons: keep` some have a single response.

        Raises:
            DataError: a group breaks a rule and `on_error` is stop, or too many do; names file, row
                and group.
        """
        drafts = [draft for group in fragments if (draft := self._merged(group)) is not None]
        kept: list[Group] = []
        for draft in self._tokenized(drafts):
            self._drop_unrewarded(draft)
            self._drop_empty(draft)
            if self._fits_max_length(draft) and self._has_min_size(draft):
                kept += self._checked(draft)
        return kept

    def _merged(self, spilled: Sequence[KeyedFragment]) -> Draft | None:
        """The draft of a group, or None if its rows contradict each other and are dropped."""
        try:
            return self._merge(spilled)
        except DataError as error:
            first = spilled[0][0]
            assert first.group_id is not None
            responses = [r for fragment, _ in spilled for r in self._responses(fragment)]
            self._refusals.group(Draft(first.group_id, first, None, responses, 0), error)
        return None

    def _tokenize(self, drafts: Sequence[Draft]) -> None:
        self._remove_padding([r for draft in drafts for r in draft.responses])
        self.counts.update(tokenize(drafts, self._encoder, self._config, self._error))

    def _tokenized(self, drafts: Sequence[Draft]) -> Sequence[Draft]:
        """The drafts with token ids, without those whose prompts cannot be tokenised."""
        try:
            self._tokenize(drafts)
        except DataError:
            if not self.broken.drops:
                raise
            # One at a time, to find which of them breaks the rule.
            return [draft for draft in drafts if self._tokenize_one(draft)]
        return drafts

    def _tokenize_one(self, draft: Draft) -> bool:
        """Tokenise a draft and drop what cannot be tokenised; False if that is the prompt."""
        prompt = replace(draft, responses=[])
        try:
            self._tokenize([prompt])
        except DataError as error:
            self._refusals.group(draft, error)
            return False
        draft.prompt_ids = prompt.prompt_ids
        for fragment in {id(r.fragment): r.fragment for r in draft.responses}.values():
            own = [r for r in draft.responses if r.fragment is fragment]
            try:
                self._tokenize([replace(draft, responses=own)])
            except DataError as error:
                self._refusals.row(draft, fragment, error)
        return True

    def _checked(self, draft: Draft) -> list[Group]:
        """The group of a draft; none if it breaks a rule of the dataset and is dropped."""
        group = self._finish(draft)
        whole = group.group_size >= MIN_GROUP_SIZE  # else it waits for a merge, and is not counted
        if self.broken.drops:  # else the writer checks the group
            try:
                vocab_size = None if self._encoder is None else self._encoder.vocab_size
                check_group(group, vocab_size=vocab_size, incomplete=not whole)
            except DataError as error:
                self._refusals.group(draft, error)
                return []
        assert draft.prompt_ids is not None
        if whole:
            self._tally.keep(draft.prompt_ids, draft.responses)
            kept = draft.first.metadata
            if any(r.fragment.metadata != kept for r in draft.responses):
                self.counts["differing_metadata_groups"] += 1
        if draft.reduced or draft.group_id in self._reduced:
            self.counts["groups_reduced_by_errors"] += 1
        return [group]

    def _error(self, draft: Draft, fragment: Fragment, error: DataError) -> DataError:
        label = self._inputs[fragment.file].label
        return with_location(error, file=label, row=fragment.row, group=draft.group_id)

    def _where(self, fragment: Fragment) -> str:
        return f"{self._inputs[fragment.file].label}, row {fragment.row}"

    def _merge(self, spilled: Sequence[KeyedFragment]) -> Draft:
        first, first_key = spilled[0]
        assert first.group_id is not None
        with_ids = next((f for f, _ in spilled if f.prompt_token_ids is not None), None)
        prompt_ids = None if with_ids is None else with_ids.prompt_token_ids
        draft = Draft(first.group_id, first, prompt_ids, [], sum(f.size for f, _ in spilled))
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

    def _responses(self, fragment: Fragment) -> list[DraftResponse]:
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
                messages=fragment.response_messages[i] if fragment.response_messages else None,
                stopped_by_string=fragment.stopped(i),
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

    def _remove_padding(self, responses: Sequence[DraftResponse]) -> None:
        if self._padding is None:
            return
        for response in responses:
            if response.ids is None:
                continue
            kept = self._padding.unpadded_length(response.ids)
            mask = None if response.mask is None else response.mask[:kept]
            if kept < len(response.ids) and (mask is None or mask.any()):
                if response.mask is None or response.mask[kept:].any():
                    response.sampler_logprob = None  # the logged one counts the padding
                response.ids, response.mask = response.ids[:kept], mask
                self.counts["unpadded_responses"] += 1
            elif self._padding.ends_in_padding(response.ids):
                self.counts["responses_that_end_in_padding"] += 1

    def _drop(self, draft: Draft, what: str, keep: Callable[[DraftResponse], bool]) -> None:
        gone = [response for response in draft.responses if not keep(response)]
        draft.responses = [response for response in draft.responses if keep(response)]
        self._tally.drop(what, gone)

    def _drop_unrewarded(self, draft: Draft) -> None:
        if draft.first.rewards is not None:  # then every row of the log has rewards
            self._drop(draft, "dropped_unrewarded_responses", lambda r: r.reward is not None)

    def _drop_empty(self, draft: Draft) -> None:
        while empty := next((r for r in draft.responses if not _length(r)), None):
            if self._config.empty_responses == "drop":
                break
            cut = ", cut before its first token" if empty.truncated else ""
            cut += ", ended by a stop string" if empty.stopped_by_string else ""
            self._refusals.row(
                draft,
                empty.fragment,
                DataError(
                    "a response needs at least 1 token",
                    received=f"{'no ids' if empty.text is None else repr(empty.text)}{cut}",
                    remedy="drop such responses (empty_responses: drop)",
                ),
            )
        self._drop(draft, "dropped_empty_responses", lambda r: _length(r) > 0)

    def _fits_max_length(self, draft: Draft) -> bool:
        """Apply max_length to the responses; False if the group is dropped."""
        limit = self._config.max_length
        if limit is None or draft.prompt_ids is None:
            return True
        prompt = len(draft.prompt_ids)
        room = limit - prompt
        while over := next((r for r in draft.responses if _length(r) > room), None):
            if self._config.overlong != "error":
                break
            error = DataError(
                f"prompt and response have at most {limit} tokens (max_length)",
                received=f"{prompt + _length(over)} ({prompt} + {_length(over)})",
                remedy="raise max_length, or choose overlong: drop or overlong: truncate",
            )
            if room < 1:
                self._refusals.group(draft, self._error(draft, over.fragment, error))
                return False
            self._refusals.row(draft, over.fragment, error)
        if over is None:
            return True
        if room < 1:
            self.counts["dropped_overlong_prompts"] += 1
            self._tally.drop("dropped_overlong_responses", draft.responses)
            return False
        if self._config.overlong == "truncate":
            self._cut(draft, room)
        self._drop(draft, "dropped_overlong_responses", lambda r: _length(r) <= room)
        return True

    def _cut(self, draft: Draft, room: int) -> None:
        for response in draft.responses:
            if response.ids is None or len(response.ids) <= room:
                continue
            mask = None if response.mask is None else response.mask[:room]
            if mask is not None and not mask.any():
                continue  # no token of the policy is left: the caller drops it as overlong
            response.ids, response.mask, response.truncated = response.ids[:room], mask, True
            response.sampler_logprob = None  # the logged one is of the uncut response
            self.counts["cut_overlong_responses"] += 1

    def _has_min_size(self, draft: Draft) -> bool:
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
            self._tally.drop("dropped_singletons", draft.responses)
            return False
        left = "" if draft.logged == k else f" of {draft.logged} that were logged"
        error = DataError(
            f"a group needs at least {MIN_GROUP_SIZE} responses",
            received=f"{k}{left} for the prompt {draft.first.messages or draft.first.prompt!r}",
            remedy="add responses for this prompt, drop such groups (singletons: drop), or keep "
            "them as incomplete groups for a later merge (singletons: keep)",
        )
        self._refusals.group(draft, error)
        return False

    def _finish(self, draft: Draft) -> Group:
        first, responses = draft.first, draft.responses
        ids = tuple(r.ids for r in responses if r.ids is not None)
        assert len(ids) == len(responses)
        assert draft.prompt_ids is not None
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
            template_arguments=first.template_arguments,
            response_messages=tuple(r.messages or "" for r in responses)
            if any(r.messages for r in responses)
            else None,
            sampler_seq_logprobs=np.array(logprobs) if len(logprobs) == len(responses) else None,
        )


def _length(response: DraftResponse) -> int:
    return 0 if response.ids is None else len(response.ids)
