"""Responses per second of local sampling, compared with a loop over `model.generate`.

    .venv/bin/python benchmarks/collect/sampling.py

The loop takes prompts in order, as many as fill the same batch size with their k responses, and
pads them on the right. The model has random weights, so that the lengths can be controlled: in
`spread` one token in 50 ends a response; in `full` no token does, and all responses have 256
tokens. One thread, CPU seconds. Prints responses per second of both, `sample_speedup_vs_generate`
(their ratio in `spread`) and `sample_speedup_full` (their ratio in `full`); the last line is one
JSON object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from gvpo_offline.sampling.decode import Completion, Decoder, DecodingRules

N_PROMPTS, K, MAX_NEW, BATCH = 16, 8, 256, 32
VOCAB, HIDDEN, LAYERS = 2000, 256, 4
SPREAD = list(range(2, 2 + VOCAB // 50))
FULL = [VOCAB]  # none of the tokens


def make_model() -> Any:
    """A Qwen3 with random weights."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HIDDEN // 4,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.Qwen3ForCausalLM(config).eval()


def make_prompts() -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Prompts of 10 to 119 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 120, N_PROMPTS)
    return [rng.integers(100, VOCAB, int(n)).astype(np.int32) for n in lengths]


def by_generate(model: Any, prompts: list[Any], ends: list[int]) -> int:
    """Sample with the loop over `generate`; returns the number of responses."""
    given = 0
    for start in range(0, len(prompts), BATCH // K):
        piece = prompts[start : start + BATCH // K]
        longest = max(map(len, piece))
        ids = np.stack([np.pad(p, (0, longest - len(p))) for p in piece])
        mask = np.stack([np.arange(longest) < len(p) for p in piece])
        with torch.inference_mode():
            given += len(
                model.generate(
                    input_ids=torch.from_numpy(ids).long(),
                    attention_mask=torch.from_numpy(mask).long(),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=MAX_NEW,
                    num_return_sequences=K,
                    eos_token_id=ends,
                    pad_token_id=0,
                )
            )
    return given


def by_decoder(model: Any, prompts: list[Any], ends: list[int]) -> int:
    """Sample with the package's decoder; returns the number of responses."""
    rules = DecodingRules(transformers.LogitsProcessorList(), False, frozenset(ends), MAX_NEW)
    decoder = Decoder(model, rules, batch_size=BATCH, max_batch_tokens=1 << 20)
    completions = [Completion(p, seed=K * i + j) for i, p in enumerate(prompts) for j in range(K)]
    return len(list(decoder.run(completions)))


def rate(work: Callable[[], int]) -> float:
    """Responses per CPU second."""
    started = time.process_time()
    given = work()
    return given / (time.process_time() - started)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model, prompts = make_model(), make_prompts()
    figures: dict[str, float] = {}
    for name, ends in (("spread", SPREAD), ("full", FULL)):
        for way in (by_generate, by_decoder):
            found = rate(lambda way=way, ends=ends: way(model, prompts, ends))  # type: ignore[misc]
            figures[f"{way.__name__}_{name}_per_s"] = round(found, 2)
    spread, full = (
        figures[f"by_decoder_{name}_per_s"] / figures[f"by_generate_{name}_per_s"]
        for name in ("spread", "full")
    )
    figures["sample_speedup_vs_generate"] = round(spread, 2)
    figures["sample_speedup_full"] = round(full, 2)
    for name, value in figures.items():
        print(f"{name:<28} {value:>8}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
