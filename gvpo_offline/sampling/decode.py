"""Drawing many responses from one model at a time, each from a seed of its own.

`model.generate` keeps a row in its batch until the longest one ends, and draws all rows from one
stream of random numbers. Here a row that ends makes room for the next response, the responses of a
prompt share its prefill, and a response's draws depend on its own seed alone: not on what else is
in the batch, nor on the order of the work. What the batch leaves is rounding: its size decides the
last bits of the logits. One queue on one machine gives the same tokens each time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Int32Array
from gvpo_offline.hashing import splitmix64

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows that may be idle before the batch is made anew, as a share of it.
_IDLE = 8
_MANTISSA_BITS = 52
_CACHES = ("past_key_values", "cache_params")
_PROBE = np.array([7, 3, 11, 5, 13], np.int32)
_PROBE_TOLERANCE = 0.25  # of the logits' standard deviation: above bfloat16's rounding


@dataclass(slots=True, eq=False)
class Draft:
    """A response in the making.

    Attributes:
        prompt: (P,) int32 token ids; drafts of one prompt hold one and the same array.
        seed: decides every draw.
        ids: what was drawn so far, end token included.
        logprobs: of each id, in nats: what it was drawn with, after temperature and filters.
        finish_reason: "stop" or "length"; empty while it goes on.
    """

    prompt: Int32Array
    seed: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""


@dataclass(frozen=True)
class Rules:
    """What is done to the logits, and when a response ends.

    Attributes:
        processors: transformers' own, applied to (ids, logits).
        greedy: take the likeliest token instead of drawing one.
        end_ids: tokens that end a response.
        max_new_tokens: tokens that a response has at most.
        stops: whether the ids so far end in a stop string; None if there are none.
    """

    processors: LogitsProcessorList
    greedy: bool
    end_ids: frozenset[int]
    max_new_tokens: int
    stops: Callable[[Sequence[int]], bool] | None = None

    def finish_reason(self, draft: Draft) -> str:
        """Why the draft ends with its last token; empty if it does not."""
        if draft.ids[-1] in self.end_ids or (self.stops and self.stops(draft.ids)):
            return "stop"
        return "length" if len(draft.ids) >= self.max_new_tokens else ""


def uniforms(seeds: Sequence[int], steps: Sequence[int]) -> Tensor:
    """Numbers in [0, 1), one for each pair of a seed and a step: (B,) float64."""
    keys = splitmix64(np.array(seeds, np.uint64))
    with np.errstate(over="ignore"):
        bits = splitmix64(keys + np.array(steps, np.uint64)) >> np.uint64(64 - _MANTISSA_BITS)
    return torch.from_numpy(bits.astype(np.float64) / 2.0**_MANTISSA_BITS)


def draw(scores_BV: Tensor, uniforms_B: Tensor, *, greedy: bool) -> tuple[Tensor, Tensor]:
    """One token for each row, by inverting the cumulative distribution.

    Args:
        scores_BV: (B, V) float32 logits as processed; -inf where a token is out.
        uniforms_B: (B,) float64 in [0, 1).
        greedy: take the likeliest token, whose probability is then 1.

    Returns:
        (B,) int64 ids and (B,) float32 log-probs, in nats, of the distribution drawn from.

    Raises:
        DataError: a score is not a number.
    """
    if greedy:
        ids_B = scores_BV.argmax(-1)
        return ids_B, torch.zeros_like(ids_B, dtype=torch.float32)
    cumulative_BV = scores_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    if not cumulative_BV[:, -1].isfinite().all():
        raise DataError(
            "a model's logits are numbers",
            received="logits that are not",
            remedy="check the model's weights, or use a wider dtype",
        )
    # Strictly above: a token of probability 0 is never taken.
    targets_B = uniforms_B.to(cumulative_BV.device) * cumulative_BV[:, -1]
    ids_B = torch.searchsorted(cumulative_BV, targets_B[:, None], right=True)[:, 0]
    return ids_B, scores_BV.log_softmax(-1).gather(-1, ids_B[:, None])[:, 0]


class Decoder:
    """A model at work on a queue of drafts.

    Args:
        model: on its device, in eval mode.
        rules: as said there.
        batch_size: responses in the making at a time.
        max_batch_tokens: cells of the cache, rows times their common length, at most.
    """

    def __init__(
        self, model: PreTrainedModel, rules: Rules, *, batch_size: int, max_batch_tokens: int
    ) -> None:
        self._model = model
        self._rules = rules
        self._batch_size = batch_size
        self._max_tokens = max_batch_tokens
        taken = inspect.signature(model.forward).parameters
        self._optional = {name for name in ("position_ids", "logits_to_keep") if name in taken}
        # A model that calls its cache otherwise takes no notice of one of this name.
        self._cache = next((name for name in _CACHES if name in taken), _CACHES[0])

    @torch.inference_mode()
    def probe(self) -> None:
        """Raise ConfigError unless a padded batch goes on from its cache as whole texts would.

        Models differ in where they keep their state and in whether they heed padding, and one that
        does not fit goes wrong without a word.
        """
        prompts = [_PROBE[:3], _PROBE]
        try:
            rows = self._prefill([Draft(prompt, seed=0) for prompt in prompts])
            positions_B1 = rows.mask_BT.sum(-1, keepdim=True) - 1
            found_BV = self._forward(rows.ids_BT[:, -1:], rows.mask_BT, positions_B1, rows.cache)
            for row, draft in enumerate(rows.drafts):
                text_1T = torch.tensor([[*draft.prompt.tolist(), *draft.ids]])
                logits = self._model(input_ids=text_1T.to(self._model.device), use_cache=False)
                expected_V = logits.logits[0, -1].float()
                off = float((found_BV[row] - expected_V).abs().max() / expected_V.std())
                if not off < _PROBE_TOLERANCE:
                    raise ValueError(f"logits that are off by {off:.2f} of their spread")
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(
                "a model goes on from its cache, in a padded batch, as from the whole text",
                received=f"{type(self._model).__name__}: {error}",
                remedy="serve the model and sample with kind: openai",
            ) from error

    @torch.inference_mode()
    def run(self, drafts: Sequence[Draft]) -> Iterator[Draft]:
        """The drafts, each as soon as it is finished."""
        # Longest prompts first, so that rows of one batch are padded little.
        order = sorted(range(len(drafts)), key=lambda i: (-len(drafts[i].prompt), i))
        queue = [drafts[i] for i in reversed(order)]
        rows: _Rows | None = None
        while queue or rows is not None:
            rows = self._filled(queue, rows)
            self._decode(rows)
            yield from (draft for draft in rows.drafts if draft.finish_reason)
            rows = rows.without_finished()

    def _filled(self, queue: list[Draft], rows: _Rows | None) -> _Rows:
        """The rows, and more for as many drafts as there is room for."""
        if rows is None:
            return self._prefill(self._admitted(queue, 0, 0))
        if rows.mergeable and (taken := self._admitted(queue, *rows.mask_BT.shape)):
            return rows.merged(self._prefill(taken))
        return rows

    def _admitted(self, queue: list[Draft], n_rows: int, length: int) -> list[Draft]:
        taken: list[Draft] = []
        while queue and n_rows < self._batch_size:
            n_rows, length = n_rows + 1, max(length, len(queue[-1].prompt))
            if n_rows > 1 and n_rows * (length + self._rules.max_new_tokens) > self._max_tokens:
                break
            taken.append(queue.pop())
        return taken

    def _prefill(self, drafts: list[Draft]) -> _Rows:
        prompts = list({id(draft.prompt): draft.prompt for draft in drafts}.values())
        number = {id(prompt): i for i, prompt in enumerate(prompts)}
        longest = max(map(len, prompts))
        # A row is padded with its own first token, so that a penalty on tokens that were seen
        # falls on none that was not.
        ids = np.stack([np.pad(p, (longest - len(p), 0), constant_values=p[0]) for p in prompts])
        mask = np.stack([np.arange(longest) >= longest - len(p) for p in prompts])
        device = self._model.device
        ids_UT = torch.from_numpy(ids.astype(np.int64)).to(device)
        mask_UT = torch.from_numpy(mask.astype(np.int64)).to(device)
        cache = DynamicCache(config=self._model.config)
        positions_UT = (mask_UT.cumsum(-1) - 1).clamp(min=0)
        logits_UV = self._forward(ids_UT, mask_UT, positions_UT, cache)
        index_B = torch.tensor([number[id(draft.prompt)] for draft in drafts], device=device)
        cache.reorder_cache(index_B)
        rows = _Rows(drafts, ids_UT[index_B], mask_UT[index_B], cache)
        self._take(rows, logits_UV[index_B])
        return rows

    def _decode(self, rows: _Rows) -> None:
        """Go on until enough rows are finished."""
        idle = sum(bool(draft.finish_reason) for draft in rows.drafts)
        while idle * _IDLE < len(rows.drafts):
            positions_B1 = rows.mask_BT.sum(-1, keepdim=True) - 1
            logits_BV = self._forward(rows.ids_BT[:, -1:], rows.mask_BT, positions_B1, rows.cache)
            idle += self._take(rows, logits_BV)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """(B, V) float32 logits of the last position."""
        options = {"position_ids": positions, "logits_to_keep": 1}
        found = self._model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **{self._cache: cache},
            **{name: options[name] for name in self._optional},
        )
        logits: Tensor = found.logits[:, -1].float()
        return logits

    def _take(self, rows: _Rows, logits_BV: Tensor) -> int:
        """Draw each row's next token; returns how many rows have ended with it."""
        scores_BV = self._rules.processors(rows.ids_BT, logits_BV)
        steps = [len(draft.ids) for draft in rows.drafts]
        uniforms_B = uniforms([draft.seed for draft in rows.drafts], steps)
        ids_B, logprobs_B = draw(scores_BV, uniforms_B, greedy=self._rules.greedy)
        rows.append(ids_B)
        ended = 0
        pairs = zip(rows.drafts, ids_B.tolist(), logprobs_B.tolist(), strict=True)
        for draft, token, logprob in pairs:
            if not draft.finish_reason:
                draft.ids.append(token)
                draft.logprobs.append(logprob)
                draft.finish_reason = self._rules.finish_reason(draft)
                ended += bool(draft.finish_reason)
        return ended


class _Rows:
    """A batch in the making: ids and mask of all tokens, the cache of all but the last."""

    def __init__(
        self, drafts: list[Draft], ids_BT: Tensor, mask_BT: Tensor, cache: DynamicCache
    ) -> None:
        self.drafts = drafts
        self.ids_BT = ids_BT
        self.mask_BT = mask_BT
        self.cache = cache

    @property
    def mergeable(self) -> bool:
        """Whether rows can join: attention's keys and values can be padded, other states not."""
        kinds = (DynamicLayer, DynamicSlidingWindowLayer)
        return all(type(layer) in kinds for layer in self.cache.layers)

    def append(self, ids_B: Tensor) -> None:
        self.ids_BT = torch.cat([self.ids_BT, ids_B[:, None]], -1)
        self.mask_BT = pad(self.mask_BT, (0, 1), value=1)

    def without_finished(self) -> _Rows | None:
        """The rows that go on, without the columns that only the others needed."""
        kept = [i for i, draft in enumerate(self.drafts) if not draft.finish_reason]
        if not kept:
            return None
        if len(kept) == len(self.drafts):
            return self
        index_B = torch.tensor(kept, device=self.ids_BT.device)
        self.cache.reorder_cache(index_B)
        mask_BT = self.mask_BT[index_B]
        unused = int(mask_BT.argmax(-1).min()) if self.mergeable else 0
        for layer in self.cache.layers if unused else ():
            _crop(layer, unused)
        return _Rows(
            [self.drafts[i] for i in kept],
            self.ids_BT[index_B, unused:],
            mask_BT[:, unused:],
            self.cache,
        )

    def merged(self, other: _Rows) -> _Rows:
        """Both, the shorter padded on the left."""
        lengths = self.mask_BT.shape[-1], other.mask_BT.shape[-1]
        ids, masks = [], []
        for rows, length in zip((self, other), lengths, strict=True):
            missing = max(lengths) - length
            first = rows.ids_BT[:, :1].expand(-1, missing)
            ids.append(torch.cat([first, rows.ids_BT], -1))
            masks.append(pad(rows.mask_BT, (missing, 0)))
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            _join(mine, theirs)
        return _Rows([*self.drafts, *other.drafts], torch.cat(ids), torch.cat(masks), self.cache)


def _crop(layer: Any, columns: int) -> None:
    """Forget a layer's first columns; a window may have forgotten them already."""
    if layer.is_sliding:
        layer.cumulative_length -= columns
        columns = max(0, layer.keys.shape[-2] - layer.cumulative_length)
    layer.keys = layer.keys[..., columns:, :]
    layer.values = layer.values[..., columns:, :]


def _join(mine: Any, theirs: Any) -> None:
    """Add the rows of another layer, the shorter padded on the left."""
    length = max(mine.keys.shape[-2], theirs.keys.shape[-2])
    for name in ("keys", "values"):
        parts = (getattr(mine, name), getattr(theirs, name))
        padded = [pad(part, (0, 0, length - part.shape[-2], 0)) for part in parts]
        setattr(mine, name, torch.cat(padded))
    if mine.is_sliding:
        mine.cumulative_length = max(mine.cumulative_length, theirs.cumulative_length)
