"""Builds groups from their fragments: merges, tokenises and filters by the settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.importing.broken_rows import BrokenRows
from gvpo_offline.importing.draft import Draft as _Draft
from gvpo_offline.importing.draft import DraftResponse as _Response
from gvpo_offline.importing.draft import InputNames, Merger, Refusals
from gvpo_offline.importing.encode import Encoder
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.regroup import KeyedFragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.tally import Tally
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
        earlier: number of broken rows that the first pass dropped.
        reduced: ids of the groups that these rows belong to.

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
        earlier: int = 0,
        reduced: Collection[str] = (),
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._inputs = inputs
        self._components = components
        self._merger = Merger(config, inputs, components)
        self._tally = tally or Tally()
        self.counts: Counter[str] = self._tally.counts
        self.broken = BrokenRows(config, earlier)
        self._refusals = Refusals(self._merger, self.broken)
        self._reduced = reduced

    def found(self) -> dict[str, Any]:
        """The counts and details of a task's commit record."""
        details = {**self._tally.details(), "broken": self.broken.records}
        return {"counts": dict(sorted(self.counts.items())), "details": details}

    def groups(self, fragments: Sequence[Sequence[KeyedFragment]]) -> list[Group]:
        """Build one group per list of fragments, in order; the settings may drop some.

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

    def _merged(self, spilled: Sequence[KeyedFragment]) -> _Draft | None:
        """The draft of a group, or None if its rows contradict each other and are dropped."""
        try:
            return self._merger.merge(spilled)
        except DataError as error:
            first = spilled[0][0]
            assert first.group_id is not None
            responses = [r for fragment, _ in spilled for r in self._merger.responses(fragment)]
            self._refusals.group(_Draft(first.group_id, first, None, responses, 0), error)
        return None

    def _tokenized(self, drafts: Sequence[_Draft]) -> Sequence[_Draft]:
        """The drafts with token ids, without those whose prompts cannot be tokenised."""
        try:
            self._tokenize_prompts([draft for draft in drafts if draft.prompt_ids is None])
            self._tokenize_responses([r for draft in drafts for r in draft.responses])
        except DataError:
            if not self.broken.drops:
                raise
            # One at a time, to find which of them breaks the rule.
            return [draft for draft in drafts if self._tokenize_one(draft)]
        return drafts

    def _tokenize_one(self, draft: _Draft) -> bool:
        """Tokenise a draft and drop what cannot be tokenised; False if that is the prompt."""
        try:
            self._tokenize_prompts([draft] if draft.prompt_ids is None else [])
        except DataError as error:
            self._refusals.group(draft, error)
            return False
        refused: Fragment | None = None
        for response in tuple(draft.responses):
            if response.fragment is refused:
                continue
            try:
                self._tokenize_responses([response])
            except DataError as error:
                refused = response.fragment
                self._refusals.row(draft, refused, error)
        return True

    def _checked(self, draft: _Draft) -> list[Group]:
        """The group of a draft; none if it breaks a rule of the dataset and is dropped."""
        group = self._finish(draft)
        if self.broken.drops:  # else the writer checks the group
            try:
                vocab_size = None if self._encoder is None else self._encoder.vocab_size
                check_group(group, vocab_size=vocab_size)
            except DataError as error:
                self._refusals.group(draft, error)
                return []
        assert draft.prompt_ids is not None
        self._tally.keep(draft.prompt_ids, draft.responses)
        if draft.reduced or draft.group_id in self._reduced:
            self.counts["groups_reduced_by_errors"] += 1
        return [group]

    def _error(self, draft: _Draft, fragment: Fragment, error: DataError) -> DataError:
        return self._merger.located(draft, fragment, error)

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
        gone = [response for response in draft.responses if not keep(response)]
        draft.responses = [response for response in draft.responses if keep(response)]
        self._tally.drop(what, gone)

    def _drop_unrewarded(self, draft: _Draft) -> None:
        if draft.first.rewards is not None:  # then every row of the log has rewards
            self._drop(draft, "dropped_unrewarded_responses", lambda r: r.reward is not None)

    def _drop_empty(self, draft: _Draft) -> None:
        while empty := next((r for r in draft.responses if not _length(r)), None):
            if self._config.empty_responses == "drop":
                break
            cut = ", cut before its first token" if empty.truncated else ""
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

    def _fits_max_length(self, draft: _Draft) -> bool:
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
        """Apply the minimum group size; False if the group is dropped."""
        k = len(draft.responses)
        if k >= MIN_GROUP_SIZE:
            return True
        if k == 0:
            self.counts["dropped_groups_without_responses"] += 1
            return False
        if self._config.singletons == "drop":
            self._tally.drop("dropped_singletons", draft.responses)
            return False
        left = "" if draft.logged == k else f" of {draft.logged} that were logged"
        error = DataError(
            f"a group needs at least {MIN_GROUP_SIZE} responses",
            received=f"{k}{left} for the prompt {draft.first.messages or draft.first.prompt!r}",
            remedy="add responses for this prompt, or drop such groups (singletons: drop)",
        )
        self._refusals.group(draft, error)
        return False

    def _finish(self, draft: _Draft) -> Group:
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
            sampler_seq_logprobs=np.array(logprobs) if len(logprobs) == len(responses) else None,
        )


def _length(response: _Response) -> int:
    return 0 if response.ids is None else len(response.ids)
