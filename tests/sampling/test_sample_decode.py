"""Drawing from a model: each response by its own seed, whatever else is in the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hybrid_models import HYBRIDS, REFUSED, hybrid_model
from support.tiny_models import VOCAB_SIZE, tiny_model
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.sampling.decode import Completion, Decoder, DecodingRules, draw, uniforms
from gvpo_offline.sampling.drawn import read
from gvpo_offline.sampling.local import logits_processors
from gvpo_offline.sampling.settings import SamplingSettings

MAX_NEW = 14


def rules(
    *, greedy: bool = False, processors: Sequence[Any] = (), n_ends: int = 8
) -> DecodingRules:
    """Some 1 in 12 tokens ends a response, so that lengths differ."""
    ends = frozenset(range(2, 2 + n_ends))
    return DecodingRules(LogitsProcessorList(processors), greedy, ends, MAX_NEW)


def completions(n_prompts: int = 5, k: int = 4) -> list[Completion]:
    """k completions for each of some prompts of 1 to 19 tokens."""
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(20, VOCAB_SIZE, int(rng.integers(1, 20)), dtype=np.int32)
        for _ in range(n_prompts)
    ]
    return [Completion(p, seed=10 * i + j) for i, p in enumerate(prompts) for j in range(k)]


def decoded(
    model: Any, work: list[Completion], batch: int, by: DecodingRules, tokens: int = 10**6
) -> list[Completion]:
    """The completions, finished, in the order given."""
    finished = list(Decoder(model, by, batch_size=batch, max_batch_tokens=tokens).run(work))
    assert sorted(map(id, finished)) == sorted(map(id, work))  # each once
    return work


def one_by_one(
    model: Any, completion: Completion, by: DecodingRules
) -> tuple[list[int], list[float]]:
    """The same response without cache, batch or padding: the whole text anew for each token."""
    ids: list[int] = []
    logprobs = []
    while True:
        text = torch.tensor([[*completion.prompt.tolist(), *ids]])
        with torch.inference_mode():
            scores = by.processors(text, model(input_ids=text).logits[:, -1].float())
        uniform = uniforms([completion.seed], [len(ids)])
        token, logprob = draw(scores, uniform, greedy=by.greedy)
        ids.append(int(token))
        logprobs.append(float(logprob))
        if ids[-1] in by.end_ids or len(ids) == by.max_new_tokens:
            return ids, logprobs


# Full and sliding windows (shorter than the texts), absolute and relative positions, and a hybrid
# whose states cannot be padded.
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3", "bloom", "gpt-oss"])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_as_if_drawn_one_by_one(family: str, batch: int) -> None:
    model = tiny_model(family)
    by = rules()
    for completion in decoded(model, completions(), batch, by):
        ids, logprobs = one_by_one(model, completion, by)
        assert completion.ids == ids
        assert completion.logprobs == pytest.approx(logprobs, abs=2e-4)
        assert completion.finish_reason == ("stop" if ids[-1] in by.end_ids else "length")


@pytest.mark.parametrize("family", list(HYBRIDS))
def test_hybrids_run_batch_by_batch(family: str) -> None:
    """Or are refused by the probe, which no wrong one passes."""
    model, by = hybrid_model(family), rules()
    if family in {*REFUSED, "mamba", "falcon-mamba"}:
        with pytest.raises(ConfigError, match="from its cache, in a padded batch"):
            Decoder(model, by, batch_size=4, max_batch_tokens=10**6).probe()
        return
    Decoder(model, by, batch_size=4, max_batch_tokens=10**6).probe()
    for completion in decoded(model, completions(3, 3), 4, by):
        assert completion.ids == one_by_one(model, completion, by)[0]


def test_the_order_of_the_work_is_no_matter() -> None:
    model, by = tiny_model("qwen3"), rules()
    forward = decoded(model, completions(), 6, by)
    backward = decoded(model, completions()[::-1], 4, by, tokens=120)[::-1]
    assert [d.ids for d in forward] == [d.ids for d in backward]
    assert len({tuple(d.ids) for d in forward}) > 15  # seeds differ, and so do responses


def test_a_penalty_does_not_fall_on_padding() -> None:
    """The pad token is one like any other to a penalty on tokens that were seen."""
    model = tiny_model("qwen3")
    by = rules(processors=[RepetitionPenaltyLogitsProcessor(3.0)])
    for completion in decoded(model, completions(), 20, by):
        assert completion.ids == one_by_one(model, completion, by)[0]


def test_greedy_is_generate() -> None:
    """The same tokens as `model.generate` without sampling, prompt by prompt."""
    model, by = tiny_model("llama"), rules(greedy=True)
    for completion in decoded(model, completions(4, 1), 3, by):
        prompt = torch.from_numpy(completion.prompt.astype(np.int64))[None]
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=MAX_NEW,
            eos_token_id=sorted(by.end_ids),
            pad_token_id=0,
        )
        assert completion.ids == out[0, len(completion.prompt) :].tolist()
        assert set(completion.logprobs) == {0.0}


def test_the_processors_are_those_of_generate() -> None:
    chosen = SamplingSettings(
        temperature=0.7, top_p=0.9, top_k=30, min_p=0.02, repetition_penalty=1.2
    )
    import transformers

    model = tiny_model("qwen3")
    generation = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, top_k=30, min_p=0.02, repetition_penalty=1.2
    )
    theirs = model._get_logits_processor(generation)
    torch.manual_seed(0)
    ids, logits = torch.randint(0, VOCAB_SIZE, (3, 9)), torch.randn(3, VOCAB_SIZE)
    assert torch.equal(logits_processors(chosen)(ids, logits.clone()), theirs(ids, logits.clone()))


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=8),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 7),
)
@settings(max_examples=200, deadline=None)
def test_a_draw_inverts_the_distribution(
    scores: list[float], uniform: float, impossible: int
) -> None:
    """Token i is drawn for numbers from p_1 + ... + p_(i-1) up to p_1 + ... + p_i."""
    row = torch.tensor([scores], dtype=torch.float32)
    if impossible < len(scores) - 1:
        row[0, impossible] = -torch.inf
    token, logprob = draw(row, torch.tensor([uniform], dtype=torch.float64), greedy=False)
    p = row.softmax(-1).double()[0]
    i = int(token)
    assert p[i] > 0
    assert p[:i].sum() / p.sum() <= uniform + 1e-6
    assert uniform <= p[: i + 1].sum() / p.sum() + 1e-6
    assert float(logprob) == pytest.approx(float(p[i].log()), abs=1e-4)


def test_draws_have_the_probabilities() -> None:
    """0.5, 0.3 and 0.2 of 20,000 draws, within four standard deviations (0.0141 of each)."""
    n = 20_000
    scores = torch.tensor([0.5, 0.3, 0.2]).log().expand(n, 3)
    tokens, _ = draw(scores, uniforms(range(n), [0] * n), greedy=False)
    seen = Counter(tokens.tolist())
    for token, p in enumerate((0.5, 0.3, 0.2)):
        assert abs(seen[token] / n - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_uniforms_are_the_same_on_every_machine() -> None:
    """splitmix64(splitmix64(seed) + step), its 52 leading bits over 2^52."""
    assert uniforms([0, 1], [0, 5]).tolist() == [0.6524484863740321, 0.46519245062848724]
    many = uniforms(range(1000), [3] * 1000)
    assert float(many.min()) >= 0
    assert float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.04


def test_logits_that_are_not_finite_are_refused() -> None:
    for greedy in (False, True):
        with pytest.raises(DataError, match="logits are finite numbers"):
            read(*draw(torch.tensor([[0.0, torch.nan]]), uniforms([1], [1]), greedy=greedy))
