"""Continuous batching of a transformers model, with a seed for each response.

A finished row makes room for the next response, the responses of a prompt share its prefill, and a
response's draws depend on its own seed alone: not on the rest of the batch, nor on the order of the
work. Only rounding depends on the batch, whose size decides the last bits of the logits; one queue
on one machine gives the same tokens each time.

transformers' own continuous batching (tried with 5.17 and 5.23) draws all rows from the process's
one generator, drops a repetition penalty with a log line, ignores stop strings, and fails for
models with linear, chunked or latent attention or convolutions. `generate` with these draws as a
logits processor gives the same tokens, but runs each row until the longest one ends and prefills a
prompt once per response: 2.0 to 3.5 times the CPU time at lengths of mean 53 and maximum 256.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gvpo_offline.compute.devices import to_device
from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Int32Array
from gvpo_offline.hashing import splitmix64
from gvpo_offline.sampling.drawn import read

# The batch is rebuilt once this share of its rows, 1 / _IDLE, is finished.
_IDLE = 8
_MANTISSA_BITS = 52
_CACHES = ("past_key_values", "cache_params")
_PROBE = np.array([7, 3, 11, 5, 13], np.int32)
_PROBE_TOLERANCE = 0.25  # of the logits' standard deviation: above bfloat16's rounding


@dataclass(slots=True, eq=False)
class Completion:
    """A response while it is generated.

    Attributes:
        prompt: (P,) int32 token ids; completions of one prompt share one array object.
        seed: determines every draw.
        ids: token ids drawn so far, end token included.
        logprobs: of each id, in nats, under the distribution it was drawn from (after temperature
            and filters).
        finish_reason: "stop" or "length"; empty while unfinished.
        stopped_by_string: whether a stop string ended it, not an end token.
    """

    prompt: Int32Array
    seed: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    stopped_by_string: bool = False


@dataclass(frozen=True)
class DecodingRules:
    """How logits are processed, and when a response ends.

    Attributes:
        processors: transformers' logits processors, called with (ids, logits).
        greedy: take the likeliest token instead of drawing one.
        end_ids: tokens that end a response.
        max_new_tokens: maximum number of tokens of a response.
        stops: whether the ids so far end in a stop string; None without stop strings.
    """

    processors: LogitsProcessorList
    greedy: bool
    end_ids: frozenset[int]
    max_new_tokens: int
    stops: Callable[[Sequence[int]], bool] | None = None

    def finish_reason(self, completion: Completion) -> str:
        """Why the completion ends with its last token; empty if it does not."""
        if completion.ids[-1] in self.end_ids or (self.stops and self.stops(completion.ids)):
            return "stop"
        return "length" if len(completion.ids) >= self.max_new_tokens else ""


def uniforms(seeds: Sequence[int], steps: Sequence[int]) -> Tensor:
    """Numbers in [0, 1), one for each pair of a seed and a step: (B,) float64."""
    keys = splitmix64(np.array(seeds, np.uint64))
    with np.errstate(over="ignore"):
        bits = splitmix64(keys + np.array(steps, np.uint64)) >> np.uint64(64 - _MANTISSA_BITS)
    return torch.from_numpy(bits.astype(np.float64) / 2.0**_MANTISSA_BITS)


def draw(scores_BV: Tensor, uniforms_B: Tensor, *, greedy: bool) -> tuple[Tensor, Tensor]:
    """One token for each row, by inverting the cumulative distribution.

    Args:
        scores_BV: (B, V) float32 processed logits; -inf where a token is excluded.
        uniforms_B: (B,) float64 in [0, 1).
        greedy: take the likeliest token, whose probability is then 1.

    Returns:
        (B,) int64 ids and (B,) float32 log-probs, in nats, of the distribution drawn from, on the
        device, which is not waited for. A row with a logit that is NaN or infinite has the log-prob
        NaN, which `read` refuses.
    """
    if greedy:
        largest_B, ids_B = scores_BV.max(-1)  # of a row with a NaN: NaN
        return ids_B, torch.where(largest_B.isfinite(), 0.0, torch.nan)
    cumulative_BV = scores_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    sums_B = cumulative_BV[:, -1]
    # Strictly above: a token of probability 0 is never drawn.
    targets_B = to_device(uniforms_B, sums_B.device) * sums_B
    ids_B = torch.searchsorted(cumulative_BV, targets_B[:, None], right=True)[:, 0]
    # Of a row with a NaN the search may end behind the last token.
    ids_B = ids_B.clamp(max=scores_BV.shape[-1] - 1)
    logprobs_B = scores_BV.log_softmax(-1).gather(-1, ids_B[:, None])[:, 0]
    return ids_B, torch.where(sums_B.isfinite(), logprobs_B, torch.nan)


class DecodableModel(Protocol):
    """What `Decoder` needs of a model; every causal language model of transformers has it."""

    @property
    def config(self) -> Any:
        """The configuration of the transformers model."""

    @property
    def device(self) -> torch.device:
        """The device of its inputs."""

    @property
    def forward(self) -> Callable[..., Any]:
        """The function whose parameters name the inputs that the model takes."""

    def __call__(self, **inputs: Any) -> Any:
        """An output with `logits`, (B, T, V)."""


class Decoder:
    """Generates a queue of completions with one model.

    Args:
        model: on its device, in eval mode.
        rules: how logits are processed, and when a response ends.
        batch_size: maximum number of rows of a batch.
        max_batch_tokens: maximum size of the cache in tokens: rows times their common length.
    """

    def __init__(
        self,
        model: DecodableModel,
        rules: DecodingRules,
        *,
        batch_size: int,
        max_batch_tokens: int,
    ) -> None:
        self._model = model
        self._rules = rules
        self._batch_size = batch_size
        self._max_tokens = max_batch_tokens
        parameters = inspect.signature(model.forward).parameters
        self._optional = {n for n in ("position_ids", "logits_to_keep") if n in parameters}
        # A model that names its cache differently ignores this one; `probe` finds that out.
        self._cache = next((name for name in _CACHES if name in parameters), _CACHES[0])

    # Not inference_mode: a policy in training would keep the tensors that it caches here.
    @torch.no_grad()
    def probe(self) -> None:
        """Raise ConfigError unless a padded batch with a cache gives the logits of whole texts.

        Models differ in where they keep their state and in whether they respect padding; one that
        does not fit would give wrong logits without an error.
        """
        vocab_size = getattr(self._model.config.get_text_config(), "vocab_size", None)
        ids = _PROBE % (vocab_size or len(_PROBE) * _PROBE.max())
        prompts = [ids[:3], ids]
        try:
            batch = self._prefill([Completion(prompt, seed=0) for prompt in prompts])
            found_BV = self._next_logits(batch)
            for row, completion in enumerate(batch.completions):
                text_1T = torch.tensor([[*completion.prompt.tolist(), *completion.ids]])
                logits = self._model(input_ids=text_1T.to(self._model.device), use_cache=False)
                expected_V = logits.logits[0, -1].float()
                off = float((found_BV[row] - expected_V).abs().max() / expected_V.std())
                if not off < _PROBE_TOLERANCE:
                    raise ValueError(f"logits that differ by {off:.2f} standard deviations")
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(
                "a model gives the same logits from its cache, in a padded batch, as from the "
                "whole text",
                received=f"{getattr(self._model, 'name', type(self._model).__name__)}: {error}",
                remedy="serve the model and sample with kind: openai",
            ) from error

    @torch.no_grad()
    def run(self, completions: Sequence[Completion]) -> Iterator[Completion]:
        """The completions, each as soon as it is finished."""
        # Longest prompts first, so that the rows of a batch need little padding.
        order = sorted(range(len(completions)), key=lambda i: (-len(completions[i].prompt), i))
        queue = [completions[i] for i in reversed(order)]
        batch: _DecodingBatch | None = None
        while queue or batch is not None:
            batch = self._refilled(queue, batch)
            self._decode(batch)
            yield from (c for c in batch.completions if c.finish_reason)
            batch = batch.without_finished()

    def _refilled(self, queue: list[Completion], batch: _DecodingBatch | None) -> _DecodingBatch:
        """The batch with as many completions of the queue as there is room for."""
        if batch is None:
            return self._prefill(self._admitted(queue, 0, 0))
        if batch.mergeable and (admitted := self._admitted(queue, *batch.mask_BT.shape)):
            return batch.merged(self._prefill(admitted))
        return batch

    def _admitted(self, queue: list[Completion], n_rows: int, length: int) -> list[Completion]:
        """Completions removed from the queue that fit beside `n_rows` rows of `length` tokens."""
        admitted: list[Completion] = []
        while queue and n_rows < self._batch_size:
            n_rows, length = n_rows + 1, max(length, len(queue[-1].prompt))
            if n_rows > 1 and n_rows * (length + self._rules.max_new_tokens) > self._max_tokens:
                break
            admitted.append(queue.pop())
        return admitted

    def _prefill(self, completions: list[Completion]) -> _DecodingBatch:
        """A new batch with each distinct prompt forwarded once, and the first tokens drawn."""
        prompts = list({id(c.prompt): c.prompt for c in completions}.values())
        number = {id(prompt): i for i, prompt in enumerate(prompts)}
        longest = max(map(len, prompts))
        # Padding with the row's own first token: a repetition penalty then changes no other token.
        ids = np.stack([np.pad(p, (longest - len(p), 0), constant_values=p[0]) for p in prompts])
        mask = np.stack([np.arange(longest) >= longest - len(p) for p in prompts])
        device = self._model.device
        ids_UT = to_device(ids.astype(np.int64), device)
        mask_UT = to_device(mask.astype(np.int64), device)
        cache = DynamicCache(config=self._model.config)
        positions_UT = (mask_UT.cumsum(-1) - 1).clamp(min=0)
        logits_UV = self._forward(ids_UT, mask_UT, positions_UT, cache)
        index_B = to_device([number[id(c.prompt)] for c in completions], device)
        cache.reorder_cache(index_B)
        batch = _DecodingBatch(completions, ids_UT[index_B], mask_UT[index_B], cache)
        self._append_tokens(batch, logits_UV[index_B])
        return batch

    def _decode(self, batch: _DecodingBatch) -> None:
        """Draw tokens until enough rows are finished."""
        finished = sum(bool(c.finish_reason) for c in batch.completions)
        while finished * _IDLE < len(batch.completions):
            finished += self._append_tokens(batch, self._next_logits(batch))

    def _next_logits(self, batch: _DecodingBatch) -> Tensor:
        """(B, V) float32 logits after the batch's last tokens."""
        positions_B1 = batch.mask_BT.sum(-1, keepdim=True) - 1
        return self._forward(batch.ids_BT[:, -1:], batch.mask_BT, positions_B1, batch.cache)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """(B, V) float32 logits of the last position."""
        options = {"position_ids": positions, "logits_to_keep": 1}
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **{self._cache: cache},
            **{name: options[name] for name in self._optional},
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _append_tokens(self, batch: _DecodingBatch, logits_BV: Tensor) -> int:
        """Draw each row's next token; returns the number of rows that end with it."""
        scores_BV = self._rules.processors(batch.ids_BT, logits_BV)
        steps = [len(c.ids) for c in batch.completions]
        uniforms_B = uniforms([c.seed for c in batch.completions], steps)
        ids_B, logprobs_B = draw(scores_BV, uniforms_B, greedy=self._rules.greedy)
        batch.append(ids_B)
        ended = 0
        ids, logprobs = read(ids_B, logprobs_B)
        for completion, token, logprob in zip(batch.completions, ids, logprobs, strict=True):
            if not completion.finish_reason:
                completion.ids.append(token)
                completion.logprobs.append(logprob)
                completion.finish_reason = self._rules.finish_reason(completion)
                stopped = completion.finish_reason == "stop"
                completion.stopped_by_string = stopped and token not in self._rules.end_ids
                ended += bool(completion.finish_reason)
        return ended


class _DecodingBatch:
    """Left-padded rows: ids and mask of all tokens, the cache of all but the last.

    Args:
        completions: B completions, in the order of the rows.
        ids_BT: (B, T) int64 token ids.
        mask_BT: (B, T) int64, 0 where padded.
        cache: of T - 1 tokens.
    """

    def __init__(
        self,
        completions: list[Completion],
        ids_BT: Tensor,
        mask_BT: Tensor,
        cache: DynamicCache,
    ) -> None:
        self.completions = completions
        self.ids_BT = ids_BT
        self.mask_BT = mask_BT
        self.cache = cache

    @property
    def mergeable(self) -> bool:
        """Whether rows can join: keys and values can be padded, recurrent states cannot."""
        kinds = (DynamicLayer, DynamicSlidingWindowLayer)
        return all(type(layer) in kinds for layer in self.cache.layers)

    def append(self, ids_B: Tensor) -> None:
        self.ids_BT = torch.cat([self.ids_BT, ids_B[:, None]], -1)
        self.mask_BT = pad(self.mask_BT, (0, 1), value=1)

    def without_finished(self) -> _DecodingBatch | None:
        """The unfinished rows, without the columns that are padding in all of them."""
        kept = [i for i, c in enumerate(self.completions) if not c.finish_reason]
        if not kept:
            return None
        if len(kept) == len(self.completions):
            return self
        index_B = to_device(kept, self.ids_BT.device)
        self.cache.reorder_cache(index_B)
        mask_BT = self.mask_BT[index_B]
        unused = int(mask_BT.argmax(-1).min()) if self.mergeable else 0
        for layer in self.cache.layers if unused else ():
            _crop(layer, unused)
        return _DecodingBatch(
            [self.completions[i] for i in kept],
            self.ids_BT[index_B, unused:],
            mask_BT[:, unused:],
            self.cache,
        )

    def merged(self, other: _DecodingBatch) -> _DecodingBatch:
        """The rows of both batches, the shorter padded on the left."""
        lengths = self.mask_BT.shape[-1], other.mask_BT.shape[-1]
        ids, masks = [], []
        for batch, length in zip((self, other), lengths, strict=True):
            missing = max(lengths) - length
            first = batch.ids_BT[:, :1].expand(-1, missing)
            ids.append(torch.cat([first, batch.ids_BT], -1))
            masks.append(pad(batch.mask_BT, (missing, 0)))
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            _join(mine, theirs)
        completions = [*self.completions, *other.completions]
        return _DecodingBatch(completions, torch.cat(ids), torch.cat(masks), self.cache)


def _crop(layer: Any, columns: int) -> None:
    """Remove a cache layer's first columns; a sliding window may have dropped them already."""
    if layer.is_sliding:
        layer.cumulative_length -= columns
        columns = max(0, layer.keys.shape[-2] - layer.cumulative_length)
    layer.keys = layer.keys[..., columns:, :]
    layer.values = layer.values[..., columns:, :]


def _join(mine: Any, theirs: Any) -> None:
    """Append another cache layer's rows, the shorter layer padded on the left."""
    length = max(mine.keys.shape[-2], theirs.keys.shape[-2])
    for name in ("keys", "values"):
        parts = (getattr(mine, name), getattr(theirs, name))
        padded = [pad(part, (0, 0, length - part.shape[-2], 0)) for part in parts]
        setattr(mine, name, torch.cat(padded))
    if mine.is_sliding:
        mine.cumulative_length = max(mine.cumulative_length, theirs.cumulative_length)
