"""The column `sampler_seq_logprobs` of sampled groups: its values, and where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.importing import content, read_groups
from support.sampling import FaultServer, config, local, remote
from support.tiny_policy import train_tokenizer

from gvpo_offline.sampling import run as run_module
from gvpo_offline.sampling.gather import SampledRows
from gvpo_offline.sampling.log import Sample
from gvpo_offline.sampling.run import run_sample
from gvpo_offline.sampling.sampler_logprobs import other_distribution, sequence_logprob
from gvpo_offline.sampling.settings import sampler_settings
from gvpo_offline.store.manifest import load_manifest

# A response of at most 24 tokens; the decoder and a forward over the whole text round each
# token's log-prob differently, by at most 1e-4 nats (test_sample.test_log_probs_are_kept).
TOLERANCE = 24 * 1e-4
PLAIN = {"top_k": -1, "min_p": 0, "repetition_penalty": 1}


def by_definition(model: Any, prompt: list[int], ids: list[int], settings: dict[str, Any]) -> float:
    """log mu(y | x): each token's distribution written out, without transformers' processors."""
    import torch

    total = 0.0
    with torch.inference_mode():
        every = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].double().numpy()
    for t, token in enumerate(ids):
        before = [*prompt, *ids[:t]]
        logits = every[len(before) - 1].copy()
        penalty = settings.get("repetition_penalty", 1.0)
        for old in set(before):
            logits[old] = logits[old] / penalty if logits[old] > 0 else logits[old] * penalty
        logits = logits / settings.get("temperature", 1.0)
        if k := settings.get("top_k", 0):
            logits[logits < np.sort(logits)[-k]] = -np.inf
        p = np.exp(logits - logits.max())
        p /= p.sum()
        if (top_p := settings.get("top_p", 1.0)) < 1:
            order = np.argsort(-p)
            kept = order[: int((np.cumsum(p[order]) < top_p).sum()) + 1]
            p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
            p /= p.sum()
        if min_p := settings.get("min_p", 0.0):
            p = np.where(p >= min_p * p.max(), p, 0)
            p /= p.sum()
        total += float(np.log(p[token]))
    return total


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5, "repetition_penalty": 1.3},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8},
        {"min_p": 0.2, "stop": ["e", "a"], "max_new_tokens": 24},
    ],
    ids=lambda settings: "_".join(settings) or "plain",
)
def test_it_is_the_sum_under_the_distribution_drawn_from(
    tmp_path: Path, tiny_model_dir: Path, settings: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    samplers = {"s": local(tiny_model_dir, responses=4, **settings)}
    result = run_sample(config(tmp_path, tiny_model_dir, samplers, n=3))
    assert not result.without_logprobs
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    endings = set()
    for group in read_groups(tmp_path / "data"):
        prompt = group.prompt_token_ids.tolist()
        own = [
            by_definition(model, prompt, ids.tolist(), settings) for ids in group.response_token_ids
        ]
        assert group.sampler_seq_logprobs is not None
        assert group.sampler_seq_logprobs.tolist() == pytest.approx(own, abs=TOLERANCE)
        endings |= set(group.truncated)
    assert endings


def test_the_end_token_counts_where_it_was_drawn(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """The same text, ended by the model or cut before its end: the difference is log p(end).

    A model whose logits do not depend on the text draws <eos> with probability 1/2 and each of two
    other tokens with 1/4: a response of n tokens with its end has n log(1/4) + log(1/2).
    """
    import torch
    from support.tiny_policy import make_tiny_model
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path / "model", tiny_tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    eos, first, second = 2, 50, 51
    with torch.no_grad():
        # The final norm gives a vector of ones, so that a token's logit is the sum of its row.
        for name, weight in model.named_parameters():
            weight.zero_() if "norm" not in name else weight.fill_(1.0)
        width = model.config.hidden_size
        head = torch.full((len(model.lm_head.weight), width), -100.0 / width)
        head[eos], head[first], head[second] = np.log(2) / width, 0.0, 0.0
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(head)
        model.model.embed_tokens.weight = torch.nn.Parameter(torch.ones_like(head))
    model.save_pretrained(folder)
    samplers = {"s": local(folder, responses=20, max_new_tokens=3)}
    run_sample(config(tmp_path, folder, samplers, n=2))
    seen = set()
    for group in read_groups(tmp_path / "data"):
        assert group.sampler_seq_logprobs is not None
        for ids, cut, logprob in zip(
            group.response_token_ids, group.truncated, group.sampler_seq_logprobs, strict=True
        ):
            others = int((ids != eos).sum())
            ended = int(ids[-1] == eos)
            assert ended != cut
            # Weights and the softmax round in float32: below 1e-4 over three tokens.
            expected = others * np.log(1 / 4) + ended * np.log(1 / 2)
            assert logprob == pytest.approx(expected, abs=1e-4)
            seen.add((others, ended))
    assert seen == {(0, 1), (1, 1), (2, 1), (3, 0)}


def test_greedy_answers_are_certain(tmp_path: Path, tiny_model_dir: Path) -> None:
    samplers = {
        "greedy": local(tiny_model_dir, responses=1, temperature=0),
        "warm": local(tiny_model_dir, responses=1),
    }
    run_sample(config(tmp_path, tiny_model_dir, samplers, n=2))
    for group in read_groups(tmp_path / "data"):
        assert group.sampler_seq_logprobs is not None
        assert group.sampler_seq_logprobs[0] == 0
        assert group.sampler_seq_logprobs[1] < -1


def test_it_is_of_the_prompt_under_the_samplers_system_prompt(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from gvpo_offline.tokenizer import load_tokenizer

    samplers = {"s": local(tiny_model_dir, system_prompt="Be brief.")}
    run_sample(config(tmp_path, tiny_model_dir, samplers, n=1))
    (group,) = read_groups(tmp_path / "data")
    tokenizer = load_tokenizer(str(tiny_model_dir))
    chat = "<|system|>\nBe brief.<eos>\n" + tokenizer.decode(group.prompt_token_ids)
    prompt = tokenizer(chat, add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    own = [by_definition(model, prompt, ids.tolist(), {}) for ids in group.response_token_ids]
    assert group.sampler_seq_logprobs is not None
    assert group.sampler_seq_logprobs.tolist() == pytest.approx(own, abs=TOLERANCE)


def test_another_tokenizer_gives_none(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Its log-probs are of other tokens; a group with such a response has none at all."""
    other = train_tokenizer(tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"<|system|>"', '"<|sys|>"'))
    samplers = {"own": local(tiny_model_dir), "other": local(tiny_model_dir)}
    samplers["other"]["tokenizer_name_or_path"] = str(other)
    result = run_sample(config(tmp_path, tiny_model_dir, samplers, n=2))
    cause = "the sampler's tokenizer is not the dataset's"
    assert result.without_logprobs == {"other": {cause: 6}}
    assert any(cause in line and "sampler other: 6 " in line for line in result.lines())
    assert all(g.sampler_seq_logprobs is None for g in read_groups(tmp_path / "data"))
    again = run_sample(config(tmp_path, tiny_model_dir, samplers, n=2))
    assert again.without_logprobs == result.without_logprobs


@pytest.fixture
def server() -> Iterator[FaultServer]:
    """Answers with three tokens of log-prob -0.5, -0.25 and -1, and their ids."""
    started = FaultServer()

    def tokens(body: dict[str, Any], answer: dict[str, Any]) -> None:
        for choice in answer["choices"]:
            values = [-0.5, -0.25, -1.0]
            choice["logprobs"] = {"content": [{"token": "x", "logprob": v} for v in values]}
            choice["token_ids"] = [50, 51, 2]

    started.extra = tokens
    yield started
    started.close()


def test_a_server_that_draws_from_the_model(
    tmp_path: Path, tiny_tokenizer_dir: Path, server: FaultServer
) -> None:
    """-0.5 - 0.25 - 1 = -1.75; and none where the server's own defaults are not known."""
    own = {"return_token_ids": True, "logprobs": True}
    samplers = {"s": remote(server.url, extra_body=PLAIN, **own)}
    result = run_sample(config(tmp_path, tiny_tokenizer_dir, samplers, n=2))
    assert not result.without_logprobs
    for group in read_groups(tmp_path / "data"):
        assert group.sampler_seq_logprobs is not None
        assert group.sampler_seq_logprobs.tolist() == [-1.75] * 3
    where = {"output_dir": str(tmp_path / "unknown")}
    samplers = {"s": remote(server.url, **own)}
    result = run_sample(config(tmp_path, tiny_tokenizer_dir, samplers, n=2, **where))
    ((cause, n),) = result.without_logprobs["s"].items()
    assert n == 6
    assert "defaults of its own of top_k, min_p, repetition_penalty" in cause
    assert all(g.sampler_seq_logprobs is None for g in read_groups(tmp_path / "unknown"))


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"logprobs": False}, "set logprobs: true"),
        ({"return_token_ids": False}, "set return_token_ids"),
        ({"temperature": 0.7}, "temperature: 0.7"),
        ({"temperature": 0, "responses": 1}, "temperature: 0"),
        ({"top_p": 0.9}, "top_p: 0.9"),
        ({"top_k": 20}, "top_k: 20"),
        ({"min_p": 0.1}, "min_p: 0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: 1.1"),
        ({"extra_body": {**PLAIN, "temperature": 0.7}}, "extra_body sets temperature: 0.7"),
        ({"extra_body": {**PLAIN, "top_k": 20}}, "extra_body sets top_k: 20"),
        ({"extra_body": {**PLAIN, "logit_bias": {"5": 1}}}, "extra_body sets logit_bias"),
        ({"extra_body": {**PLAIN, "frequency_penalty": 0.1}}, "frequency_penalty: 0.1"),
        ({"extra_body": {**PLAIN, "response_format": {"type": "json_object"}}}, "response_format"),
        ({"extra_body": {"top_k": -1, "min_p": 0}}, "defaults of its own of repetition_penalty"),
        ({"extra_body": {**PLAIN, "presence_penalty": 0, "user": "u", "logit_bias": {}}}, None),
        ({"extra_body": PLAIN, "system_prompt": "Be brief.", "stop": ["\n"]}, None),
    ],
)
@pytest.mark.parametrize("kind", ["openai", "openai_batch"])
def test_which_servers_give_them(kind: str, changes: dict[str, Any], cause: str | None) -> None:
    address = {"base_url": "http://localhost/v1"} if kind == "openai" else {}
    own = {"model": "m", "logprobs": True, "return_token_ids": True, "extra_body": PLAIN}
    found = other_distribution(sampler_settings("s", {"kind": kind, **address, **own, **changes}))
    if cause is None:
        assert found is None
    else:
        assert found is not None
        assert cause in found


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, None),
        ({"temperature": 0.7, "top_p": 0.9}, None),
        ({"engine": {"logprobs_mode": "raw_logprobs"}}, None),
        ({"engine": {"logprobs_mode": "raw_logprobs"}, "top_k": 5}, "top_k: 5"),
        ({"engine": {"logprobs_mode": "processed_logits"}}, "processed_logits"),
        ({"engine": {"logprobs_mode": "raw_logprobs", "logits_processors": ["p"]}}, "raw_logprobs"),
    ],
)
def test_which_engines_give_them(changes: dict[str, Any], cause: str | None) -> None:
    """vLLM's processed log-probs are those after temperature and filters."""
    settings = sampler_settings("s", {"kind": "vllm", "model_name_or_path": "m", **changes})
    found = other_distribution(settings)
    assert (found is None) == (cause is None)
    assert (cause or "") in (found or "")


def test_values_that_are_no_log_probs() -> None:
    """OpenAI writes -9999 for any very unlikely token, vLLM for minus infinity."""
    settings = sampler_settings("s", {"kind": "transformers", "model_name_or_path": "m"})

    def found(*values: float, ids: int | None = None) -> float | str:
        own = np.zeros(ids or len(values), np.int32)
        return sequence_logprob(
            Sample(0, 0, 0, "x", own, np.array(values, np.float32), "stop"), settings
        )

    assert found(-0.5, -0.25) == -0.75
    assert "-9999" in str(found(-0.5, -9999.0))
    assert "-inf" in str(found(-0.5, -np.inf))
    assert "no log-prob of each token" in str(found(-0.5, ids=2))
    assert "above 0" in str(found(-0.5, 1.5))
    assert found(-0.5, 1e-6) == pytest.approx(-0.499999)


def test_an_import_of_an_earlier_version_goes_on_as_it_began(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without log-probs in any shard, not with them in some; samples of that version get them."""

    def earlier(*parts: Any, **settings: Any) -> SampledRows:
        return SampledRows(*parts, **{**settings, "logprobs": False})

    samplers = {"s": local(tiny_model_dir)}
    run = config(tmp_path, tiny_model_dir, samplers, n=4)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "SampledRows", earlier)
        run_sample(run)
    data = tmp_path / "data"
    manifests = [path for path in data.glob("*.json") if path.name.startswith("manifest")]
    assert manifests
    whole = content(load_manifest(data))
    for path in manifests:
        path.unlink()  # interrupted after the shards, before the manifest
    result = run_sample(run)
    assert content(load_manifest(data)) == whole
    assert "began this import without" in str(result.without_logprobs)
    for stage in (data / "commits").glob("import-*"):
        for path in stage.iterdir():
            path.unlink()
        stage.rmdir()
    for path in manifests:
        path.unlink()  # interrupted before the import began
    assert not run_sample(run).without_logprobs
    assert all(g.sampler_seq_logprobs is not None for g in read_groups(data))
