"""The layout for models that carry a state: the prompt once, its state continued by k responses.

Linear attention, state spaces and short convolutions read a row from left to right into a state of
fixed size, so one row cannot hold several responses. What a prompt leaves behind can be shared all
the same: the prompt runs alone, and its state is continued by the group's responses as the rows of
a right-padded batch. No layer needs to know of the padding: it comes after everything that counts,
and a causal layer never looks ahead.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from gvpo_offline.errors import ConfigError, DataError

_CACHE_NAMES = ("past_key_values", "cache_params")
# One token alone takes a layer's decoding path: other kernels, which overwrite the state in place.
_LEAST_WIDTH = 2
# Kinds of layer without attention of any form; older transformers give them a cache nobody fills.
_STATELESS = ("mlp", "moe")


class PromptCache(DynamicCache):
    """What a prompt leaves in a decoder's layers: read by its responses, never overwritten.

    transformers updates recurrent and convolution states in place, over tensors that the backward
    pass still needs. Here the prompt's pass fills a state once; the responses' pass reads it and
    stores nothing, since no pass follows. Keys and values are concatenated by transformers already.

    Args:
        config: the decoder's configuration, which says what each layer keeps.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
        self._stateless = {i for i, kind in enumerate(kinds) if kind in _STATELESS}

    def fork(self, n_rows: int) -> None:
        """Let `n_rows` rows continue from the one row that was run; gradients add up over them.

        Raises:
            ConfigError: a layer that should have left its state here did not.
        """
        for number, layer in enumerate(self.layers):
            if number in self._stateless:
                continue
            if not _is_filled(layer):
                raise ConfigError(
                    "every layer leaves the prompt's state in the cache",
                    received=f"nothing from layer {number}, a {type(layer).__name__}",
                    remedy="compute whole rows for this model",
                )
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for states in (layer.conv_states, layer.recurrent_states):
                    for index, state in states.items():
                        if state is not None:
                            states[index] = state.expand(n_rows, *state.shape[1:])
            if isinstance(layer, CacheLayerMixin):
                layer.batch_repeat_interleave(n_rows)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """The inputs of a convolution, after those of the prompt where it has run: (R, D, time)."""
        layer = self.layers[layer_idx]
        if layer.has_previous_state[state_idx]:
            return torch.cat([layer.conv_states[state_idx], conv_states], dim=-1)
        first: Tensor = super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)
        return first

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """The state after the tokens of this pass: kept for the prompt, handed back after it."""
        if self.layers[layer_idx].recurrent_states[state_idx] is not None:
            return recurrent_states
        first: Tensor = super().update_recurrent_state(
            recurrent_states, layer_idx, state_idx, **kwargs
        )
        return first


def _is_filled(layer: Any) -> bool:
    """Whether a layer will hand out what the prompt left, by the flags transformers goes by."""
    linear, attention = LinearAttentionCacheLayerMixin, CacheLayerMixin
    return (not isinstance(layer, linear) or all(layer.has_previous_state.values())) and (
        not isinstance(layer, attention) or bool(layer.is_initialized)
    )


def continued_hidden(
    decoder: nn.Module,
    prompt_ids_P: Tensor,
    response_ids_KL: Tensor,
    response_lengths_K: Tensor,
    **forward_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Hidden states of one group, its prompt computed once and continued by every response.

    The gradient of the responses flows through the prompt's state into the prompt. Families whose
    layers accept a cache and ignore what it holds (the scan of the first Mamba) come out wrong
    without an error: compare with whole rows before trusting a family.

    Args:
        decoder: a transformers model without its head (`model.get_decoder()`).
        prompt_ids_P: (P,) int64, P >= 1.
        response_ids_KL: (K, ≥ longest response) int64, right-padded with any valid ids.
        response_lengths_K: (K,) int64, tokens of each response, at least 1.
        **forward_kwargs: handed to both of the decoder's forward passes.

    Returns:
        The prompt's (P, D), whose last row predicts every first token, and the responses' (K, L, D)
        in the decoder's dtype: row i of a response is the hidden state after its token i. L is the
        longest response less its last token, which predicts nothing; rows mean nothing from
        their response's last token on.

    Raises:
        ConfigError: the decoder takes no cache, leaves nothing in it, or would drop it (gradient
            checkpointing). One that insists on a cache of its own raises what it raises.
        DataError: an empty prompt, or a response without a token or longer than its row.
    """
    cache_name, takes_positions = _accepted(decoder)
    longest = _checked_longest(prompt_ids_P, response_ids_KL, response_lengths_K)
    n_prompt, n_responses = len(prompt_ids_P), len(response_lengths_K)
    cache = PromptCache(config=decoder.config)

    def hidden(ids_RL: Tensor, first_position: int) -> Tensor:
        positions = torch.arange(ids_RL.shape[1], device=ids_RL.device) + first_position
        given = {"position_ids": positions.expand_as(ids_RL)} if takes_positions else {}
        output = decoder(
            input_ids=ids_RL, use_cache=True, **{cache_name: cache}, **given, **forward_kwargs
        )
        found: Tensor = output.last_hidden_state
        return found

    prompt_PD = hidden(prompt_ids_P[None], 0)[0]
    n_inputs = longest - 1
    if n_inputs == 0:
        return prompt_PD, prompt_PD.new_zeros((n_responses, 0, prompt_PD.shape[-1]))
    cache.fork(n_responses)
    inputs_KL = response_ids_KL[:, : max(n_inputs, _LEAST_WIDTH)]
    return prompt_PD, hidden(inputs_KL, n_prompt)[:, :n_inputs]


def _accepted(decoder: nn.Module) -> tuple[str, bool]:
    """The name under which a decoder takes a cache, and whether it takes position ids."""
    for name, module in decoder.named_modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise ConfigError(
                "gradient checkpointing drops the prompt's state, which responses continue from",
                received=f"gradient checkpointing on in {name or 'the decoder'!r}",
                remedy="turn gradient checkpointing off, or compute whole rows",
            )
    parameters = inspect.signature(type(decoder).forward).parameters
    names = [name for name in _CACHE_NAMES if name in parameters]
    if len(names) != 1:
        raise ConfigError(
            f"the decoder's forward takes a cache as {' or '.join(_CACHE_NAMES)}",
            received=type(decoder).__name__,
            remedy="compute whole rows for this model",
        )
    return names[0], "position_ids" in parameters


def _checked_longest(
    prompt_ids_P: Tensor, response_ids_KL: Tensor, response_lengths_K: Tensor
) -> int:
    """Tokens of the longest response."""
    if prompt_ids_P.numel() == 0:
        raise DataError("a prompt has at least 1 token", received=0, remedy="drop the group")
    lengths: list[int] = response_lengths_K.tolist()
    n_rows, width = response_ids_KL.shape
    if len(lengths) != n_rows or not lengths or not 1 <= min(lengths) <= max(lengths) <= width:
        raise DataError(
            f"each of {n_rows} responses has between 1 and {width} tokens, the width of its row",
            received=lengths,
            remedy="pad rows to the longest response and drop empty responses",
        )
    return max(lengths)
