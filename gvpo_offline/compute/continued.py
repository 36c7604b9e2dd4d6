"""The `continued` layout, for recurrent models: responses continue the state of their prompt.

Linear attention, state space models and short convolutions read a row from left to right into a
state of fixed size, so one row cannot hold several responses. The prompt can still be shared: it
runs alone, and its cached state is the initial state of a right-padded batch of the group's
responses. No layer needs a padding mask: padding comes after all tokens of a row, and causal layers
do not attend to later tokens.
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
# A row of one token takes the decoding path of a layer, whose kernels overwrite the state in place.
_LEAST_WIDTH = 2
# Layer types without any attention; older transformers versions create a cache for them that is
# never filled.
_STATELESS = ("mlp", "moe")


class PromptCache(DynamicCache):
    """Cache of a prompt's states, which the responses read and never overwrite.

    transformers updates recurrent and convolution states in place and so overwrites tensors that
    the backward pass needs. Here the forward pass of the prompt fills each state once; the forward
    pass of the responses reads it and stores nothing, since no other pass follows. Keys and values
    need no change: transformers concatenates them.

    Args:
        config: the decoder's configuration, which gives the type of each layer.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
        self._stateless = {i for i, kind in enumerate(kinds) if kind in _STATELESS}

    def fork(self, n_rows: int) -> None:
        """Expand the states of the prompt to `n_rows` rows; gradients are summed over these rows.

        Raises:
            ConfigError: a layer did not store its state in this cache.
        """
        for number, layer in enumerate(self.layers):
            if number in self._stateless:
                continue
            if not _is_filled(layer):
                raise ConfigError(
                    "every layer stores the prompt's state in the cache",
                    received=f"nothing from layer {number}, a {type(layer).__name__}",
                    remedy="set layout to padded for this model",
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
        """Inputs of a convolution, (R, D, time), after those of the prompt once it has run."""
        layer = self.layers[layer_idx]
        if layer.has_previous_state[state_idx]:
            return torch.cat([layer.conv_states[state_idx], conv_states], dim=-1)
        first: Tensor = super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)
        return first

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """The state after this forward pass: stored if it is the prompt's, else only returned."""
        if self.layers[layer_idx].recurrent_states[state_idx] is not None:
            return recurrent_states
        first: Tensor = super().update_recurrent_state(
            recurrent_states, layer_idx, state_idx, **kwargs
        )
        return first


def _is_filled(layer: Any) -> bool:
    """Whether a layer holds the prompt's state, by the flags that transformers reads."""
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
    """Hidden states of one group; the prompt is computed once and every response continues it.

    The gradient of the responses flows through the prompt's state into the prompt. Model families
    whose layers accept a cache and ignore its content (the scan of Mamba 1) give wrong results
    without an error: compare with whole rows before using a new family.

    Args:
        decoder: a transformers model without its head (`model.get_decoder()`).
        prompt_ids_P: (P,) int64, P >= 1.
        response_ids_KL: (K, ≥ longest response) int64, right-padded with any valid ids.
        response_lengths_K: (K,) int64, tokens of each response, at least 1; cheapest on the CPU.
        **forward_kwargs: passed to both forward passes of the decoder.

    Returns:
        Hidden states of the prompt, (P, D), whose last row predicts the first token of every
        response, and of the responses, (K, L, D), in the decoder's dtype: row i of a response is
        the hidden state after its token i. L is the length of the longest response minus 1, because
        a last token predicts nothing. Rows of a response from its last token on are padding.

    Raises:
        ConfigError: the decoder takes no cache, stores nothing in it, or discards it (gradient
            checkpointing). A decoder that requires its own cache class raises its own error.
        DataError: the prompt is empty, or a response is empty or longer than its row.
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
    """Name of the decoder's cache argument, and whether the decoder takes position ids."""
    for name, module in decoder.named_modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise ConfigError(
                "gradient checkpointing drops the prompt's state, which responses continue from",
                received=f"gradient checkpointing on in {name or 'the decoder'!r}",
                remedy="turn gradient checkpointing off, or set layout to padded",
            )
    parameters = inspect.signature(type(decoder).forward).parameters
    names = [name for name in _CACHE_NAMES if name in parameters]
    if len(names) != 1:
        raise ConfigError(
            f"the decoder's forward takes a cache as {' or '.join(_CACHE_NAMES)}",
            received=type(decoder).__name__,
            remedy="set layout to padded for this model",
        )
    return names[0], "position_ids" in parameters


def _checked_longest(
    prompt_ids_P: Tensor, response_ids_KL: Tensor, response_lengths_K: Tensor
) -> int:
    """Number of tokens of the longest response, after validating the inputs."""
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
