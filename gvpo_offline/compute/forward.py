"""Forward pass of a model over a layout: hidden states of output rows, log-probs of scored tokens.

The computation runs inside the model's own `forward`, to which `install` adds one argument.
Wrappers of `forward` (DDP, FSDP, mixed precision, activation offloading) therefore apply to it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gvpo_offline.compute.attention import KeyValueStates, PackedRow, packed_forward
from gvpo_offline.compute.continued import continued_hidden
from gvpo_offline.compute.devices import to_device
from gvpo_offline.compute.head import find_head, pair_logprobs
from gvpo_offline.compute.layout import ContinuedInput, Layout, PackedInput
from gvpo_offline.compute.model import device_of
from gvpo_offline.compute.settings import ComputePath
from gvpo_offline.compute.tree import Int64Array, one_segment
from gvpo_offline.errors import ConfigError

DEFAULT_KEPT_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class TokenLogprobs:
    """Result of a forward pass over a layout.

    Attributes:
        values_M: (M,) float32 log-probs of the scored tokens, response by response, nats.
        entropy_M: (M,) float32 entropies of the distributions at the scored tokens, nats, or None.
    """

    values_M: Tensor
    entropy_M: Tensor | None = None


@dataclass(eq=False)
class PromptStates:
    """States of a prompt that its responses use.

    Attributes:
        states: for each attention module keys and values, (1, Hkv, P, D) each.
        last_hidden: (1, D) hidden state of the prompt's last token.
    """

    states: KeyValueStates
    last_hidden: Tensor


@dataclass(eq=False)
class LayoutCall:
    """Argument `call` of `forward` that requests the log-probs of a layout's scored tokens.

    Attributes:
        layout: the model input and its targets.
        path: the compute path.
        kept_bytes: most bytes of (rows, vocabulary) tensors to keep for the backward pass.
        entropy: whether to compute entropies.
        prompt: states of the prefix, if the layout is a packed row whose tree has a prefix.
    """

    layout: Layout
    path: ComputePath
    kept_bytes: int = DEFAULT_KEPT_BYTES
    entropy: bool = False
    prompt: PromptStates | None = None


@dataclass(eq=False)
class PromptCall:
    """Argument `call` of `forward` that requests the states of a prompt of (P,) int64 ids."""

    prompt_ids: Int64Array
    path: ComputePath
    states: KeyValueStates = field(default_factory=dict)


@dataclass(eq=False)
class LogitsCall:
    """Argument `call` of `forward` that requests the logits of the model's own forward pass.

    Attributes:
        inputs: arguments of the transformers model's `forward`.
    """

    inputs: dict[str, Any]


def install(model: nn.Module) -> None:
    """Add the argument `call` to a model's `forward`; without it `forward` is unchanged."""
    original = model.forward
    if hasattr(original, "__wrapped_forward__"):
        return

    # Unbound where possible: a copy of the model must use its own weights.
    function = getattr(original, "__func__", None)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, call: Any = None, **kwargs: Any) -> Any:
        plain = original if function is None else functools.partial(function, self)
        if call is None:
            return plain(*args, **kwargs)
        if isinstance(call, PromptCall):
            return _prompt_states(self, call)
        if isinstance(call, LogitsCall):
            inner = causal_lm(self)
            return (plain if inner is self else inner)(**call.inputs).logits
        return _token_logprobs(self, call, plain)

    forward.__wrapped_forward__ = original  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    inner: Any = model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def token_logprobs(model: nn.Module, call: LayoutCall) -> TokenLogprobs:
    """Log-probs of the layout's scored tokens under a model that `install` was called for.

    Raises:
        UnsupportedAttentionError, ConfigError: the model does not support this compute path.
    """
    values, entropy = model(call=call)
    return TokenLogprobs(values, entropy)


def prompt_states(model: nn.Module, call: PromptCall) -> PromptStates:
    """The states of a prompt, with their graph."""
    # Keys and values are returned in `call`: wrappers may convert the return value of `forward`.
    return PromptStates(call.states, model(call=call))


def _token_logprobs(
    model: nn.Module, call: LayoutCall, plain: Callable[..., Any]
) -> tuple[Tensor, Tensor | None]:
    targets = call.layout.targets
    if call.path.head == "logits":
        pairs_N, entropy_H = _from_logits(model, call, plain)
    else:
        hidden_HD = _hidden_rows(causal_lm(model).get_decoder(), call)
        found = pair_logprobs(
            find_head(model),
            hidden_HD,
            torch.from_numpy(targets.pair_rows_N),
            torch.from_numpy(targets.pair_tokens_N),
            kept_bytes=call.kept_bytes,
            entropy=call.entropy,
        )
        pairs_N, entropy_H = found.logprobs_N, found.entropy_H
    token_pairs_M = to_device(targets.token_pairs_M, pairs_N.device)
    entropy_M = None
    if entropy_H is not None:
        rows_M = to_device(targets.pair_rows_N[targets.token_pairs_M], pairs_N.device)
        entropy_M = entropy_H[rows_M]
    return pairs_N[token_pairs_M], entropy_M


def _hidden_rows(decoder: nn.Module, call: LayoutCall) -> Tensor:
    """(H, D) hidden states of the rows that predict scored tokens."""
    given, rows_H = call.layout.input, call.layout.targets.hidden_rows_H
    if isinstance(given, ContinuedInput):
        hidden = _continued(decoder, given)
    else:
        hidden = _run(decoder, call).last_hidden_state.flatten(0, 1)
    if call.prompt is not None:
        # Only the last row of the prefix is present, as row 0.
        assert isinstance(given, PackedInput)
        hidden = torch.cat([call.prompt.last_hidden.to(hidden), hidden])
        rows_H = rows_H - (given.tree.prefix - 1)
    if len(rows_H) == len(hidden) and not rows_H[0]:
        return hidden
    found: Tensor = hidden[to_device(rows_H, hidden.device)]
    return found


def _run(model: Any, call: LayoutCall, **more: Any) -> Any:
    """Output of a decoder or a whole model for packed or padded rows."""
    given = call.layout.input
    device = device_of(model)
    assert not isinstance(given, ContinuedInput)
    ids = to_device(given.input_ids, device)
    if not isinstance(given, PackedInput):
        mask = to_device(given.attention_mask, device)
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **more)
    positions = to_device(given.position_ids, device)
    more |= {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if call.path.layout == "packed":
        # Without a mask, transformers separates the sequences where position ids restart.
        return model(**more)
    states = None if call.prompt is None else call.prompt.states
    row = PackedRow(given.tree, call.path.attention, states)
    return _run_packed(model, row, **more)


def _run_packed(model: Any, row: PackedRow, *, input_ids: Tensor, **more: Any) -> Any:
    """Output of a decoder or a whole model for a packed row with a tree."""
    with packed_forward():
        # With a mask of ones, transformers does not separate sequences where position ids restart.
        mask = torch.ones_like(input_ids)
        output = model(input_ids=input_ids, attention_mask=mask, packed_row=row, **more)
    row.check_used()
    return output


def _continued(decoder: nn.Module, given: ContinuedInput) -> Tensor:
    device = device_of(decoder)
    rows = []
    for group in given.groups:
        prompt_PD, responses_KLD = continued_hidden(
            decoder,
            to_device(group.prompt_ids, device),
            to_device(group.response_ids, device),
            torch.from_numpy(group.lengths),  # read on the host
        )
        rows += [prompt_PD, responses_KLD.flatten(0, 1)]
    return torch.cat(rows)


def _from_logits(
    model: nn.Module, call: LayoutCall, plain: Callable[..., Any]
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of pairs from the logits of the model's own forward pass."""
    if isinstance(call.layout.input, ContinuedInput) or call.prompt is not None:
        raise ConfigError(
            "models with an unsupported output layer are computed over whole rows",
            received=f"layout {call.path.layout}",
            remedy="set layout to shared, packed or padded",
        )
    targets = call.layout.targets
    logits = _run(_OriginalForward(model, plain), call).logits.flatten(0, 1)
    rows_H = to_device(targets.hidden_rows_H, logits.device)
    log_softmax_HV = torch.log_softmax(logits[rows_H].float(), dim=-1)
    row_N = to_device(targets.pair_rows_N, logits.device)
    token_N = to_device(targets.pair_tokens_N, logits.device)
    entropy_H = None
    if call.entropy:
        log_p = log_softmax_HV.detach()
        entropy_H = -(log_p.exp() * log_p).sum(-1)
    return log_softmax_HV[row_N, token_N], entropy_H


class _OriginalForward:
    """A model called with the `forward` that it had before `install`."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        self.parameters = model.parameters
        self._forward = forward

    def __call__(self, **inputs: Any) -> Any:
        return self._forward(**inputs)


def _prompt_states(model: nn.Module, call: PromptCall) -> Tensor:
    """Run a prompt: store keys and values in `call.states`, return the last hidden state (1, D)."""
    decoder = causal_lm(model).get_decoder()
    device = device_of(decoder)
    ids = to_device(call.prompt_ids, device)[None]
    row = PackedRow(one_segment(len(call.prompt_ids)), call.path.attention, recorded=call.states)
    positions = torch.arange(ids.shape[1], device=device)[None]
    output = _run_packed(decoder, row, input_ids=ids, position_ids=positions, use_cache=False)
    last: Tensor = output.last_hidden_state[0, -1:]
    return last
