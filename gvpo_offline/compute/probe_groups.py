"""The groups and parameters with which the start-up probe compares layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Group

# Parameters whose gradients are compared: how many, and the most elements of one.
_N_PARAMETERS = 16
_SMALL_PARAMETER = 1 << 20
# Tokens of the longest row on a GPU: a prompt of 5, and a response of 4 x 22.
_LONGEST_ROW = 93


def probe_groups(
    vocab_size: int, device: torch.device, context_length: int | None = None
) -> list[Group]:
    """Two groups, with equal responses, a shared prefix and a response of one token.

    About 80 distinct tokens; more on a GPU, which uses other kernels for short rows, unless they
    would exceed the model's context.
    """
    rng = np.random.default_rng(0)
    short = context_length is not None and context_length < _LONGEST_ROW
    times = 1 if device.type == "cpu" or short else 4

    def tokens(n: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return rng.integers(0, vocab_size, size=n).astype(np.int32)

    long = tokens(22 * times)
    branch = np.concatenate([long[: 17 * times], tokens(4)])
    sets = [(tokens(5), (tokens(1), long, branch, long)), (tokens(7), (tokens(3), tokens(6)))]
    return [
        Group(
            group_id=f"probe {number}",
            prompt_token_ids=prompt,
            response_token_ids=responses,
            samplers=("probe",) * len(responses),
            truncated=(False,) * len(responses),
        )
        for number, (prompt, responses) in enumerate(sets)
    ]


def sequences_of(groups: Sequence[Group]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Prompt and response token ids, (T,) int32 each, response by response."""
    for group in groups:
        for response in group.response_token_ids:
            yield group.prompt_token_ids, response


def batches_of(groups: list[Group], max_tokens: int) -> list[list[Group]]:
    """All groups in one batch under a large budget; one group in each under a small one."""
    return [groups] if max_tokens > 1000 else [[group] for group in groups]


def vocab_size_of(model: nn.Module) -> int:
    """Number of token ids that a model has embeddings for.

    Raises:
        ConfigError: neither the embeddings nor the configuration give the number.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", getattr(model.config, "vocab_size", None))
    if size is None:
        raise ConfigError(
            "the model is a transformers causal language model",
            received=f"{type(model).__name__}, which gives no vocabulary size",
        )
    return int(size)


def probe_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Some small trained parameters from all parts of the model, whose gradients are compared."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    small = [parameter for parameter in trained if parameter.numel() <= _SMALL_PARAMETER]
    chosen = small or sorted(trained, key=lambda parameter: parameter.numel())[:2]
    every = max(1, len(chosen) // _N_PARAMETERS)
    return chosen[::every]
