"""The cases of the benchmark: model shapes, groups, and goals.

Imported by the parent and both worker processes; TRL's has no gvpo_offline, so only NumPy is used.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BETA = 0.1  # reward per nat, on both sides
EOS = 1
FIRST_WORD = 2  # 0 is the padding token, 1 the end token
# Log-normal lengths with mean 1 and the spread of sampled responses. The seeds reproduce the
# numbers of padded and unique tokens for which the goals were set.
_SPREAD = 0.5
_SEEDS = {16: 4073}
_DEFAULT_SEED = 7
LITTLE_TO_SHARE = "little to share: the prompt is 4% of a sequence; no factor is promised here"


@dataclass(frozen=True)
class ModelShape:
    """Shape of a decoder; `kind` is "qwen3" (per-head norms) or "qwen2" (biases)."""

    name: str
    kind: str
    n_layers: int
    width: int
    intermediate: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = True
    dtype: str = "float32"
    lora_rank: int = 0

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the matrix products of one layer."""
        inner, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = ((self.width, inner), (self.width, kv), (self.width, kv), (inner, self.width))
        up, down = (self.width, self.intermediate), (self.intermediate, self.width)
        return (*attention, up, up, down)


@dataclass(frozen=True)
class Case:
    """One group and one model: a prompt of P tokens, k responses of `response` tokens on average.

    `goal` is the required speed-up over TRL, or None. `note` is printed beside the figures.
    """

    shape: ModelShape
    prompt: int
    response: int
    k: int
    goal: float | None = None
    checkpointing: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        """Prompt / mean response / responses."""
        return f"{self.prompt}/{self.response}/{self.k}"

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        """The inverse of `to_json`."""
        return cls(**{**values, "shape": ModelShape(**values["shape"])})

    @property
    def response_lengths(self) -> list[int]:
        """Tokens of each response, its end token included: at least 4, at most twice the mean."""
        rng = np.random.default_rng(_SEEDS.get(self.k, _DEFAULT_SEED))
        drawn = rng.lognormal(-(_SPREAD**2) / 2, _SPREAD, self.k) * self.response
        return [int(n) for n in np.clip(np.round(drawn), 4, 2 * self.response)]

    @property
    def padded_tokens(self) -> int:
        """Tokens of a batch with one row per response, padded to the longest."""
        return self.k * (self.prompt + max(self.response_lengths))

    @property
    def unique_tokens(self) -> int:
        """Tokens that predict another one: the prompt once, and each response without its last."""
        return self.prompt + sum(self.response_lengths) - self.k


@dataclass(frozen=True)
class GroupData:
    """The group of a case.

    Attributes:
        prompt: (P,) int32.
        responses: k arrays of (T_i,) int32 that end with `EOS`; random, without a shared prefix.
        rewards: (k,) float64 in [0, 1), all different.
        ref_logprobs: (k,) float64, nats: similar to those of a model with random weights.
    """

    prompt: npt.NDArray[np.int32]
    responses: tuple[npt.NDArray[np.int32], ...]
    rewards: npt.NDArray[np.float64]
    ref_logprobs: npt.NDArray[np.float64]

    @property
    def digest(self) -> str:
        """SHA-256 of all arrays, to compare processes."""
        found = hashlib.sha256()
        for ids in (self.prompt, *self.responses):
            found.update(ids.tobytes())
        for values in (self.rewards, self.ref_logprobs):
            found.update(values.tobytes())
        return found.hexdigest()


def make_group(case: Case) -> GroupData:
    """The group of `case`, the same in every process."""
    rng = np.random.default_rng([case.prompt, case.response, case.k])
    vocab_size, lengths = case.shape.vocab_size, case.response_lengths

    def words(n: int) -> npt.NDArray[np.int32]:
        return rng.integers(FIRST_WORD, vocab_size, n, dtype=np.int32)

    end = np.array([EOS], dtype=np.int32)
    return GroupData(
        prompt=words(case.prompt),
        responses=tuple(np.concatenate([words(n - 1), end]) for n in lengths),
        rewards=rng.permutation(case.k) / case.k,
        ref_logprobs=-np.log(vocab_size) * np.array(lengths) + rng.normal(0.0, 1.0, case.k),
    )


def _qwen3_small(vocab_size: int) -> ModelShape:
    return ModelShape("qwen3-8x512", "qwen3", 8, 512, 1536, 8, 4, 64, vocab_size)


_V32, _V152 = _qwen3_small(32_000), _qwen3_small(151_936)
CPU_CASES = (
    Case(_V32, 512, 128, 8, 3.5),
    Case(_V32, 128, 512, 8, 2.2),
    Case(_V32, 64, 64, 16, 3.0),
    Case(_V32, 1024, 64, 8, 5.5),
    Case(_V32, 2048, 64, 16, 8.0),
    Case(_V152, 512, 128, 8, 2.5),
    Case(_V152, 128, 512, 8, 2.0),
    Case(_V152, 64, 64, 16, 2.0),
    Case(_V32, 32, 768, 4, note=LITTLE_TO_SHARE),
)

# Widths as published for Qwen2.5.
_B05 = ModelShape("0.5B", "qwen2", 24, 896, 4864, 14, 2, 64, 151_936, dtype="bfloat16")
_B15 = ModelShape("1.5B", "qwen2", 28, 1536, 8960, 12, 2, 128, 151_936, dtype="bfloat16")
_B7 = ModelShape("7B LoRA", "qwen2", 28, 3584, 18944, 28, 4, 128, 151_936, False, "bfloat16", 16)
GPU_CASES = (
    Case(_B05, 512, 128, 8, 3.0),
    Case(_B05, 512, 1024, 16, 3.0),
    Case(_B15, 512, 128, 8, 3.0),
    Case(_B15, 256, 1024, 8, 3.0),
    Case(_B15, 512, 4096, 8, 3.0, checkpointing=True),
    Case(_B15, 512, 8192, 4, 3.0, checkpointing=True),
    Case(_B15, 8192, 256, 8, 3.0, checkpointing=True),
    Case(_B15, 1024, 256, 64, 3.0, checkpointing=True),
    Case(_B7, 1024, 512, 8, 3.0, checkpointing=True),
    Case(_B7, 8192, 512, 16, 3.0, checkpointing=True),
)
TINY_CASES = (
    Case(ModelShape("tiny", "qwen3", 2, 64, 128, 4, 2, 16, 500), 16, 8, 4, 1.0),
    Case(
        ModelShape("tiny LoRA", "qwen2", 2, 64, 128, 4, 2, 16, 500, tied=False, lora_rank=4),
        4,
        8,
        4,
        checkpointing=True,
    ),
)
