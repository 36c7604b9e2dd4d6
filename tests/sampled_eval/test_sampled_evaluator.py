"""Fresh answers of a policy in memory: their distribution, their divergence, what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.hybrid_models import REFUSED, hybrid_model
from support.sampled_answers import (
    GROUPS,
    evaluator_of,
    moved_policy,
    policy_of,
    word_dataset,
    word_ids,
)
from support.training import load

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.sampled_eval.evaluator import SampledEvaluator, check_decodable
from gvpo_offline.sampled_eval.limits import answer_limit
from gvpo_offline.sampled_eval.policy import SampledPolicy
from gvpo_offline.sampled_eval.reference import find_reference
from gvpo_offline.sampled_eval.result import paired_gain
from gvpo_offline.store.dataset import GroupDataset


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GroupDataset]:
    return word_dataset(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def policy(made: tuple[Path, GroupDataset]) -> SampledPolicy:
    return moved_policy(made[0])


@pytest.fixture(scope="module")
def evaluator(made: tuple[Path, GroupDataset], policy: SampledPolicy) -> SampledEvaluator:
    """Answers of one token."""
    return evaluator_of(*made, policy, eval_max_new_tokens=1)


def next_logprobs(model: torch.nn.Module, prompt: str) -> np.ndarray[Any, Any]:
    """(V,) float64 log-probs of the token after a prompt, by the model's own forward pass."""
    ids = torch.from_numpy(word_ids(prompt)).long()[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    found: np.ndarray[Any, Any] = logits.double().log_softmax(-1).numpy()
    return found


def test_answers_estimate_the_policys_own_reward_and_divergence(
    made: tuple[Path, GroupDataset], policy: SampledPolicy, evaluator: SampledEvaluator
) -> None:
    """Of answers of one token both are known: the probability p of the right word, and the sum of
    p log (p / q). A mean of n answers to each of 3 prompts is within 4.5 standard deviations.
    """
    reference = load(made[0]).eval()
    n = 600
    result = evaluator.evaluate(policy, range(n))
    rewards, divergences, variances = [], [], []
    for group, own in zip(GROUPS, result.prompts, strict=True):
        assert group.prompt is not None
        log_p = next_logprobs(policy.model, group.prompt)
        log_q = next_logprobs(reference, group.prompt)
        p, ratio = np.exp(log_p), log_p - log_q
        right = p[word_ids({0: "one", 1: "two", 2: "blue"}[len(rewards)])[0]]
        rewards.append(right)
        divergences.append((p * ratio).sum())
        variances.append((right * (1 - right), (p * ratio**2).sum() - (p * ratio).sum() ** 2))
        ids = [evaluator.tokenizer.convert_tokens_to_ids(text or "<eos>") for text in own.texts]
        # Special tokens have no text, so compare the others: log-probs are sums of float32.
        shown = [i for i, text in enumerate(own.texts) if text]
        np.testing.assert_allclose(own.log_ratios[shown], ratio[[ids[i] for i in shown]], atol=1e-5)
    found = result.metrics(0.5)
    spread = 4.5 * np.sqrt(np.array(variances).sum(0) / n) / len(GROUPS)
    assert abs(found["sampled_reward"] - np.mean(rewards)) < spread[0] < 0.05
    assert abs(found["sampled_kl"] - np.mean(divergences)) < spread[1] < 0.05
    assert found["sampled_kl"] > spread[1]
    assert found["sampled_objective"] == pytest.approx(
        found["sampled_reward"] - 0.5 * found["sampled_kl"], rel=1e-12
    )
    assert found["sampled_length"] == 1


def test_the_same_random_numbers_for_every_policy(
    made: tuple[Path, GroupDataset], policy: SampledPolicy, evaluator: SampledEvaluator
) -> None:
    """Whatever prompts are sampled together, and in however many parts."""
    whole = evaluator.evaluate(policy, range(6))
    again = evaluator.evaluate(policy, range(6))
    assert [own.texts for own in whole.prompts] == [own.texts for own in again.prompts]
    assert paired_gain(whole, again).mean == 0.0
    parts = evaluator.evaluate(policy, range(2)).joined(evaluator.evaluate(policy, range(2, 6)))
    assert [own.texts for own in parts.prompts] == [own.texts for own in whole.prompts]
    assert parts.metrics(1.0) == pytest.approx(whole.metrics(1.0), rel=1e-6)
    one = evaluator.evaluate(policy, range(6), evaluator.prompts[1:2])
    assert one.prompts[0].texts == whole.prompts[1].texts
    # A policy that hardly differs draws the same words.
    near = evaluator.evaluate(moved_policy(made[0], 4 + 1e-5), range(6))
    assert [own.texts for own in near.prompts] == [own.texts for own in whole.prompts]
    other = replace(evaluator, seed=1).evaluate(policy, range(6))
    assert [own.texts for own in other.prompts] != [own.texts for own in whole.prompts]


def test_a_policy_that_is_the_reference_has_no_divergence(
    made: tuple[Path, GroupDataset], evaluator: SampledEvaluator
) -> None:
    result = evaluator.evaluate(policy_of(load(made[0])), range(8))
    assert abs(result.kl.mean) < 1e-6
    assert {own.log_ratios.shape for own in result.prompts} == {(8,)}


def test_answers_end_at_an_end_token_or_are_cut(
    made: tuple[Path, GroupDataset], policy: SampledPolicy
) -> None:
    """The default limit is the longest logged response, 3 tokens, rounded up to 16."""
    evaluator = evaluator_of(*made, policy)
    assert evaluator.rules.max_new_tokens == 16
    assert "answers of at most 16 tokens at temperature 1" in evaluator.described()
    result = evaluator.evaluate(policy, range(16))
    cut = np.concatenate([own.truncated for own in result.prompts]) == 1
    lengths = np.concatenate([own.lengths for own in result.prompts])
    assert cut.any()
    assert (lengths[cut] == 16).all()
    assert (lengths[~cut] < 16).any()
    assert result.metrics(1.0)["sampled_truncated"] == cut.mean()


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_divergence_is_that_of_the_distribution_sampled_from(
    made: tuple[Path, GroupDataset], policy: SampledPolicy, temperature: float
) -> None:
    """Not that of the policy at temperature 1: at 0 an answer has probability 1."""
    evaluator = evaluator_of(
        *made, policy, eval_samples=1, eval_max_new_tokens=1, eval_temperature=temperature
    )
    result = evaluator.evaluate(policy, range(1))
    reference = load(made[0]).eval()
    for group, own in zip(GROUPS, result.prompts, strict=True):
        assert group.prompt is not None
        logits = next_logprobs(policy.model, group.prompt)
        sharp = np.zeros_like(logits)
        if temperature:
            sharp = logits / temperature
            sharp = sharp - np.log(np.exp(sharp).sum())
        token = int(logits.argmax())
        if temperature:
            token = evaluator.tokenizer.convert_tokens_to_ids(own.texts[0] or "<eos>")
        expected = sharp[token] - next_logprobs(reference, group.prompt)[token]
        assert own.log_ratios[0] == pytest.approx(expected, abs=1e-5)


def test_the_model_is_left_as_it_was(
    made: tuple[Path, GroupDataset], evaluator: SampledEvaluator
) -> None:
    """Training mode, gradients and the generator of random numbers; a later loss has a gradient."""
    policy = moved_policy(made[0])
    policy.model.train()
    state = torch.get_rng_state()
    evaluator.evaluate(policy, range(2))
    assert policy.model.training
    assert torch.equal(torch.get_rng_state(), state)
    ids = torch.from_numpy(word_ids("red green"))[None].long()
    policy.model(input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None for p in policy.model.parameters() if p.requires_grad)


# ---- ranks of a sharded model ----


class OtherRank:
    """Stands in for torch.distributed with one other rank, which calls the model some times."""

    def __init__(self, n_calls: int) -> None:
        self.left = n_calls
        self.seen: list[int] = []

    def all_reduce(self, own: torch.Tensor) -> None:
        self.seen.append(int(own))
        own += int(self.left > 0)
        self.left -= 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_rank_that_has_finished_keeps_step(
    made: tuple[Path, GroupDataset], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The other rank makes 5 forward passes. This one makes 2, fails or not, and 3 over a dummy
    input; before each, and once more, both say whether they still compute.
    """
    policy = replace(policy_of(load(made[0])), in_lockstep=True)
    passes: list[int] = []
    policy.model.register_forward_hook(lambda *given: passes.append(1))
    other = OtherRank(5)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", other.all_reduce)

    def draw() -> None:
        with policy.decoding() as calls:
            for _ in range(2):
                calls(input_ids=torch.ones((1, 3), dtype=torch.long), use_cache=False)
            if fails:
                raise DataError("logits are finite")

    if fails:
        with pytest.raises(DataError, match="logits are finite"):
            draw()
    else:
        draw()
    assert len(passes) == 5
    assert other.seen == [1, 1, 0, 0, 0, 0]
    other.left, other.seen[:] = 2, []
    assert policy.seq_logprobs([], []) == []  # a rank without prompts
    assert len(passes) == 7
    assert other.seen == [0, 0, 0]


# ---- the reference ----


def adapted(model_dir: Path) -> SampledPolicy:
    """A policy with an adapter that changes the model."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return policy_of(get_peft_model(load(model_dir), config))


def test_the_base_of_an_adapter_is_the_reference(
    made: tuple[Path, GroupDataset], evaluator: SampledEvaluator
) -> None:
    """Answers and divergence are those of the merged model beside a loaded reference."""
    policy = adapted(made[0])
    mine = evaluator_of(*made, policy, eval_max_new_tokens=5)
    assert mine.reference.loaded is None
    assert "with the adapter disabled" in mine.described()
    result = mine.evaluate(policy, range(4))
    merged = policy_of(policy.model.merge_and_unload())  # type: ignore[operator]
    beside = replace(mine, reference=evaluator.reference)
    assert beside.reference.loaded is not None
    other = beside.evaluate(merged, range(4))
    assert [own.texts for own in result.prompts] == [own.texts for own in other.prompts]
    # Sums of 5 log-probs of two float32 computations.
    for own, theirs in zip(result.prompts, other.prompts, strict=True):
        np.testing.assert_allclose(own.log_ratios, theirs.log_ratios, atol=2e-5)
    ratios = np.concatenate([own.log_ratios for own in result.prompts])
    assert np.abs(ratios).mean() > 0.01


def test_a_reference_that_cannot_be_had_is_said(
    tmp_path: Path, made: tuple[Path, GroupDataset], policy: SampledPolicy
) -> None:
    model, dataset = made
    family = dataset.reference
    assert family is not None
    nowhere = family.model_copy(update={"model_name_or_path": str(tmp_path / "gone")})
    assert "gone cannot be loaded" in find_reference(nowhere, policy).unavailable
    unknown = family.model_copy(update={"weights_sha256": ""})
    assert "does not record" in find_reference(unknown, policy).unavailable
    changed = shutil.copytree(model, tmp_path / "changed")
    moved_policy(model).model.save_pretrained(changed)  # type: ignore[operator]
    replaced = family.model_copy(update={"model_name_or_path": str(changed)})
    found = find_reference(replaced, policy)
    assert "other weights now" in found.unavailable
    evaluator = replace(evaluator_of(model, dataset, policy), reference=found)
    assert "no KL" in evaluator.described()
    metrics = evaluator.evaluate(policy, range(2)).metrics(0.1)
    assert "sampled_reward" in metrics
    assert not {"sampled_kl", "sampled_objective"} & set(metrics)


# ---- what is refused ----


@pytest.mark.parametrize("family", sorted(REFUSED)[:1])
def test_a_model_that_the_decoder_cannot_run_is_refused(family: str) -> None:
    model = hybrid_model(family)
    with pytest.raises(ConfigError, match=r"from its cache, in a padded batch.*leave eval_samples"):
        check_decodable(policy_of(model))


def test_without_a_tokenizer(made: tuple[Path, GroupDataset], policy: SampledPolicy) -> None:
    from gvpo_offline.sampled_eval.settings import SampledEvalSettings

    with pytest.raises(ConfigError, match="decoded with the policy's tokenizer; received no token"):
        SampledEvaluator.prepare(SampledEvalSettings(), [], policy, None)


def test_without_held_out_groups(made: tuple[Path, GroupDataset], policy: SampledPolicy) -> None:
    from transformers import AutoTokenizer

    from gvpo_offline.sampled_eval.settings import SampledEvalSettings

    tokenizer = AutoTokenizer.from_pretrained(made[0])
    with pytest.raises(ConfigError, match=r"received no held-out groups\. Set eval_fraction"):
        SampledEvaluator.prepare(SampledEvalSettings(), [], policy, tokenizer)


def test_a_reward_that_scores_none_of_the_logged_responses_is_refused(
    made: tuple[Path, GroupDataset], policy: SampledPolicy
) -> None:
    """Before training, and not as an evaluation in which every answer failed."""
    scorers = {"scorers": {"right": {"kind": "exact", "column": "solution"}}}
    with pytest.raises(DataError, match="the group's metadata has the column solution"):
        evaluator_of(*made, policy, eval_reward=scorers)


def test_the_limit_of_an_answer(evaluator: SampledEvaluator) -> None:
    """The longest prompt has 3 tokens. An answer's last token is not an input: room for n + 1 - 3
    tokens in a context or micro-batch of n.
    """
    prompts = evaluator.prompts
    assert answer_limit(prompts, None, context=None, most_tokens=100) == 16
    assert answer_limit(prompts, None, context=12, most_tokens=100) == 10
    assert answer_limit(prompts, None, context=None, most_tokens=12) == 10
    assert answer_limit(prompts, 40, context=None, most_tokens=100) == 40
    assert answer_limit(prompts, 10, context=12, most_tokens=100) == 10
    with pytest.raises(ConfigError, match=r"a prompt of 3 tokens, room for 10 more, and answers"):
        answer_limit(prompts, 11, context=12, most_tokens=100)
    with pytest.raises(ConfigError, match="room for 0 more") as error:
        answer_limit(prompts, None, context=2, most_tokens=100)
    assert error.value.group == "group-00002"


def test_a_short_room_is_said(
    evaluator: SampledEvaluator, caplog: pytest.LogCaptureFixture
) -> None:
    assert answer_limit(evaluator.prompts, None, context=4, most_tokens=100) == 2
    assert "at most 2 tokens, fewer than the longest logged response (3)" in caplog.text
