"""The shape of a causal language model, from its configuration alone: no weights, no torch.

Matrices, from which bytes and operations follow, are those of the architecture. Vectors (norms,
biases) are counted by family; of a family that is not listed they may be off by less than 0.1% of
the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gvpo_offline.errors import ConfigError

AttentionKind = Literal["full", "window", "chunk", "linear", "conv"]
Matrices = tuple[tuple[int, int], ...]
_KINDS: dict[str, AttentionKind] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "chunk",
    "linear_attention": "linear",
    "conv": "conv",
}


@dataclass(frozen=True)
class Family:
    """What a configuration leaves to the model's class.

    Attributes:
        gated: whether the MLP has a gate beside its up projection.
        biases: whether every linear layer has a bias.
        query_biases: whether the projections to queries, keys and values have one.
        norms: normalisations of a layer.
        norm_vectors: weights of one, per unit of width.
        query_norm: normalised queries and keys: of each head, or all heads together.
        positions: whether positions are learned.
    """

    gated: bool = True
    biases: bool = False
    query_biases: bool = False
    norms: int = 2
    norm_vectors: int = 1
    query_norm: Literal["", "head", "full"] = ""
    positions: bool = False


_LLAMAS = (
    *("llama", "mistral", "ministral", "mixtral", "smollm3", "granite", "phi3", "gemma"),
    *("deepseek_v2", "deepseek_v3"),
)
_QWEN3S = (
    *("qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe"),
    *("qwen3_5_moe_text", "lfm2"),
)
_FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_LLAMAS, Family()),
    **dict.fromkeys(("qwen2", "qwen2_moe"), Family(query_biases=True)),
    **dict.fromkeys(_QWEN3S, Family(query_norm="head")),
    **dict.fromkeys(("olmo2", "olmo3"), Family(query_norm="full")),
    "gemma2": Family(norms=4),
    **dict.fromkeys(("gemma3", "gemma3_text"), Family(norms=4, query_norm="head")),
    "glm4": Family(norms=4),
    "gpt_oss": Family(query_biases=True),
    "gpt2": Family(gated=False, biases=True, norm_vectors=2, positions=True),
    "gpt_neox": Family(gated=False, biases=True, norm_vectors=2),
    "mpt": Family(gated=False),
}
# Their query projection also makes a gate of the attention's output.
_GATED_QUERIES = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")


@dataclass(frozen=True)
class LayerShape:
    """One layer of the decoder.

    Attributes:
        kind: what its attention sees.
        window: tokens that a window or chunk holds; 0 for other kinds.
        matrices: (inputs, outputs) of each product that every token takes part in.
        expert: the same of one expert; empty without experts.
        experts, experts_per_token: number of experts, and of those that a token takes.
        vectors: number of all other weights.
        heads: query heads.
        query, key, value: widths of all heads together.
        norms: normalisations of the whole width.
        layer_norm: whether these subtract the mean; if not, they are of the root mean square.
        query_norm: whether queries and keys are normalised.
        mlp: inner width that a token passes, shared and chosen experts together.
        gated: whether the MLP has a gate.
    """

    kind: AttentionKind
    window: int
    matrices: Matrices
    expert: Matrices
    experts: int
    experts_per_token: int
    vectors: int
    heads: int
    query: int
    key: int
    value: int
    norms: int
    layer_norm: bool
    query_norm: bool
    mlp: int
    gated: bool

    @property
    def output(self) -> int:
        """Width of the attention's output, all heads together."""
        return self.value if self.key == self.query else self.query

    @property
    def dense(self) -> int:
        """Weights of the matrices that every token takes part in."""
        return sum(a * b for a, b in self.matrices)

    @property
    def active(self) -> int:
        """Weights of the matrices that one token takes part in."""
        return self.dense + self.experts_per_token * sum(a * b for a, b in self.expert)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.dense + self.experts * sum(a * b for a, b in self.expert) + self.vectors


@dataclass(frozen=True)
class ModelShape:
    """A decoder and its output layer.

    Attributes:
        model_type: name of the family, as transformers has it.
        known: whether the family is listed here; if not, it is taken as a Llama.
        layers: from the first to the last.
        width: of hidden states.
        vocabulary: rows of the embedding.
        tied: whether the output layer is the embedding.
        other: weights beside layers, embedding and output layer.
        dtype_bytes: of a weight in the checkpoint, as the configuration states; 4 if it does not.
    """

    model_type: str
    known: bool
    layers: tuple[LayerShape, ...]
    width: int
    vocabulary: int
    tied: bool
    other: int
    dtype_bytes: int = 4

    @property
    def embedding(self) -> int:
        """Weights of the embedding; as many as those of the output layer."""
        return self.width * self.vocabulary

    @property
    def decoder(self) -> int:
        """Weights of all layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def parameters(self) -> int:
        """All weights, each once."""
        return self.decoder + self.embedding * (1 if self.tied else 2) + self.other

    @property
    def active(self) -> int:
        """Weights of the layers' matrices that one token takes part in."""
        return sum(layer.active for layer in self.layers)


@dataclass(frozen=True)
class _Fields:
    """The fields of a configuration under the names that families give them."""

    config: Mapping[str, Any]

    def number(self, *names: str, default: int = 0) -> int:
        """The first of some fields that is a positive integer."""
        for name in names:
            value = self.config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return default

    def needed(self, *names: str) -> int:
        """As `number`; ConfigError if there is none."""
        found = self.number(*names)
        if not found:
            raise ConfigError(
                "the configuration of a causal language model has its sizes",
                received=f"{self.config.get('model_type', 'a configuration')!r} without "
                + " or ".join(names),
                remedy="name the folder or the hub name of a causal language model",
            )
        return found


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape of a model.

    Args:
        config: the content of its config.json. Of a model of several modalities, the part of the
            text is described.

    Raises:
        ConfigError: it lacks a size.
    """
    outer = config
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config = {"tie_word_embeddings": outer.get("tie_word_embeddings", True), **inner}
    model_type = str(config.get("model_type", outer.get("model_type", "")))
    own = _Fields(config)
    family = _FAMILIES.get(model_type, Family())
    width = own.needed("hidden_size", "n_embd", "d_model")
    count = own.needed("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    vocabulary = own.needed("vocab_size")
    layers = tuple(_layer(own, family, model_type, number, count) for number in range(count))
    positions = own.number("n_positions", "max_position_embeddings") if family.positions else 0
    # Absent, as transformers 4 writes its default.
    tied = config.get("tie_word_embeddings")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or outer.get("dtype") or "")
    return ModelShape(
        model_type=model_type,
        known=model_type in _FAMILIES,
        layers=layers,
        width=width,
        vocabulary=vocabulary,
        tied=True if tied is None else bool(tied),
        other=family.norm_vectors * width + positions * width,
        dtype_bytes=2 if "16" in dtype else 4,
    )


def _kind(own: _Fields, model_type: str, number: int) -> tuple[AttentionKind, int]:
    """What the attention of a layer sees, and the size of its window."""
    config = own.config
    window = own.number("sliding_window")
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and number < len(kinds):
        kind = _KINDS.get(str(kinds[number]), "full")
        size = own.number("attention_chunk_size") if kind == "chunk" else window
        return kind, size if kind in ("window", "chunk") else 0
    every = own.number("full_attention_interval")
    if every:
        return ("full" if (number + 1) % every == 0 else "linear"), 0
    if model_type == "gemma2":
        return ("window", window) if number % 2 == 0 and window else ("full", 0)
    pattern = own.number("sliding_window_pattern")
    if pattern and window:
        return ("full", 0) if (number + 1) % pattern == 0 else ("window", window)
    if window and config.get("use_sliding_window", True):
        return "window", window
    return "full", 0


def _layer(own: _Fields, family: Family, model_type: str, number: int, count: int) -> LayerShape:
    width = own.needed("hidden_size", "n_embd", "d_model")
    kind, window = _kind(own, model_type, number)
    heads, query, key, value, matrices, vectors = _mixer(own, family, model_type, kind)
    mlp, products, expert, experts, chosen, more = _mlp(own, family, model_type, number)
    norms = family.norms * family.norm_vectors * width
    return LayerShape(
        kind=kind,
        window=window,
        matrices=(*matrices, *products),
        expert=expert,
        experts=experts,
        experts_per_token=chosen,
        vectors=vectors + more + norms,
        heads=heads,
        query=query,
        key=key,
        value=value,
        norms=family.norms,
        layer_norm=not family.gated,
        query_norm=bool(family.query_norm) and kind not in ("linear", "conv"),
        mlp=mlp,
        gated=family.gated,
    )


_Mixer = tuple[int, int, int, int, Matrices, int]


def _mixer(own: _Fields, family: Family, model_type: str, kind: AttentionKind) -> _Mixer:
    """Heads, widths of queries, keys and values, matrices and vectors of a layer's attention."""
    width = own.needed("hidden_size", "n_embd", "d_model")
    if kind == "linear":
        return _linear_attention(own, width)
    if kind == "conv":
        kernel = own.number("conv_L_cache", default=3)
        return 0, width, width, width, ((width, 3 * width), (width, width)), kernel * width
    heads = own.needed("num_attention_heads", "n_head", "n_heads")
    if own.number("kv_lora_rank"):
        return _latent_attention(own, width, heads)
    size = own.number("head_dim", default=width // heads)
    pairs = own.number("num_key_value_heads", "num_kv_heads", default=heads)
    query, key = heads * size, pairs * size
    asked = 2 * query if model_type in _GATED_QUERIES else query
    matrices = ((width, asked), (width, key), (width, key), (query, width))
    biased = family.biases or bool(own.config.get("attention_bias"))
    vectors = asked + 2 * key if biased or family.query_biases else 0
    # Of the listed families with biases of queries alone, only gpt_oss has one here too.
    vectors += width if biased and model_type != "glm4" else 0
    vectors += heads if model_type == "gpt_oss" else 0
    if family.query_norm:
        vectors += 2 * size if family.query_norm == "head" else query + key
    return heads, query, key, key, matrices, vectors


def _linear_attention(own: _Fields, width: int) -> _Mixer:
    """Gated delta rule, as in Qwen3-Next and Qwen3.5."""
    keys = own.needed("linear_num_key_heads") * own.needed("linear_key_head_dim")
    heads, size = own.needed("linear_num_value_heads"), own.needed("linear_value_head_dim")
    values = heads * size
    matrices = ((width, 2 * keys + 2 * values), (width, 2 * heads), (values, width))
    vectors = own.number("linear_conv_kernel_dim", default=4) * (2 * keys + values)
    return heads, keys, keys, values, matrices, vectors + 2 * heads + size


def _latent_attention(own: _Fields, width: int, heads: int) -> _Mixer:
    """Multi-head latent attention of DeepSeek: keys and values from a narrow common state."""
    rank, rope = own.needed("kv_lora_rank"), own.needed("qk_rope_head_dim")
    plain, size = own.needed("qk_nope_head_dim"), own.needed("v_head_dim")
    query, low = heads * (plain + rope), own.number("q_lora_rank")
    first: Matrices = ((width, low), (low, query)) if low else ((width, query),)
    matrices = (
        *first,
        (width, rank + rope),
        (rank, heads * (plain + size)),
        (heads * size, width),
    )
    return heads, query, query, heads * size, matrices, low + rank


_Mlp = tuple[int, Matrices, Matrices, int, int, int]


def _mlp(own: _Fields, family: Family, model_type: str, number: int) -> _Mlp:
    """Width that a token passes, its matrices, an expert's, experts, chosen ones, and vectors."""
    width = own.needed("hidden_size", "n_embd", "d_model")
    inner = own.number("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    inner = inner or own.number("expansion_ratio", default=4) * width
    experts = own.number("num_experts", "n_routed_experts", "num_local_experts")
    if not experts or not _has_experts(own, number):
        biases = inner + width if family.biases else 0
        if own.config.get("mlp_bias"):
            biases = 2 * inner + width
        return inner, _products(width, inner, family.gated), (), 0, 0, biases
    size = own.number("moe_intermediate_size", default=inner)
    chosen = own.number("num_experts_per_tok", "moe_topk", default=1)
    shared = own.number("shared_expert_intermediate_size")
    gate = width if shared else 0  # of the shared expert
    shared = shared or own.number("n_shared_experts") * size
    common = _products(width, shared, family.gated) if shared else ()
    vectors = gate
    if model_type == "gpt_oss":
        vectors += experts * (2 * size + width) + experts
    expert = _products(width, size, family.gated)
    matrices = ((width, experts), *common)
    return chosen * size + shared, matrices, expert, experts, chosen, vectors


def _has_experts(own: _Fields, number: int) -> bool:
    first = own.config.get("first_k_dense_replace")
    if isinstance(first, int) and number < first:
        return False
    if number in (own.config.get("mlp_only_layers") or ()):
        return False
    return (number + 1) % own.number("decoder_sparse_step", default=1) == 0


def _products(width: int, inner: int, gated: bool) -> Matrices:
    into = ((width, inner),) * (2 if gated else 1)
    return (*into, (inner, width))
