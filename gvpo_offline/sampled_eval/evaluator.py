"""Draws answers of a policy to held-out prompts, scores them, and measures the divergence."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gvpo_offline.chat.encoder import Encoder
from gvpo_offline.collectives import gather_results, raise_together, rank_slice
from gvpo_offline.compute.context import context_length
from gvpo_offline.compute.forward import causal_lm
from gvpo_offline.errors import ConfigError
from gvpo_offline.group import FloatArray, Int32Array
from gvpo_offline.hashing import mix_key
from gvpo_offline.rewards.fresh import fresh_config
from gvpo_offline.sampled_eval.limits import answer_limit
from gvpo_offline.sampled_eval.policy import SampledPolicy
from gvpo_offline.sampled_eval.prompts import HeldOutPrompt, fresh_input, read_prompts
from gvpo_offline.sampled_eval.reference import SampledReference, find_reference
from gvpo_offline.sampled_eval.result import PromptAnswers, SampledResult, merged_results
from gvpo_offline.sampled_eval.reward import FreshReward
from gvpo_offline.sampled_eval.settings import SampledEvalSettings
from gvpo_offline.sampling.decode import Completion, Decoder, DecodingRules
from gvpo_offline.sampling.local import end_token_ids, logits_processors
from gvpo_offline.sampling.settings import SamplingSettings
from gvpo_offline.store.manifest import ReferenceFamily
from gvpo_offline.stream.view import DatasetView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_BATCH_SIZE = 64
_KEY_DIGITS = 16


@dataclass(frozen=True)
class SampledEvaluator:
    """Judges policies by fresh answers to the same prompts with the same random numbers.

    Attributes:
        prompts: the prompts.
        reward: scores the answers.
        reference: computes log-probs under the reference.
        tokenizer: decodes the answers; the dataset's.
        rules: how logits are processed, and when an answer ends.
        temperature: of the draws.
        seed: with a prompt and a number it determines an answer's draws.
    """

    prompts: tuple[HeldOutPrompt, ...]
    reward: FreshReward
    reference: SampledReference
    tokenizer: PreTrainedTokenizerBase
    rules: DecodingRules
    temperature: float = 1.0
    seed: int = 0

    @classmethod
    def prepare(
        cls,
        settings: SampledEvalSettings,
        views: Iterable[DatasetView],
        policy: SampledPolicy,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        seed: int = 0,
        reference: SampledReference | None = None,
        device: torch.device | None = None,
    ) -> SampledEvaluator:
        """Read the prompts, and check all that could fail later.

        Args:
            settings: checked settings, with a reward.
            views: the held-out groups, with rewards and a reference.
            policy: a policy that will be judged, or one of the same architecture, not sharded yet.
            tokenizer: the policy's.
            seed: see the class.
            reference: of an earlier evaluator, to load none again.
            device: where a reference is loaded; default: the policy's device.

        Raises:
            ConfigError: there is no tokenizer, no held-out group or no end token; the decoder
                cannot run the model; a prompt leaves no room for an answer; a scorer cannot be
                used.
            DataError: the reward cannot score the logged responses.
        """
        views = list(views)
        tokenizer = _required(tokenizer)
        check_decodable(policy)
        prompts = read_prompts(views, most=settings.eval_prompts, tokenizer=tokenizer)
        inner = causal_lm(policy.model)
        limit = answer_limit(
            prompts,
            settings.eval_max_new_tokens,
            context=context_length(inner.config),
            most_tokens=policy.engine.cost.max_tokens,
        )
        reward = FreshReward(fresh_config(settings.eval_reward or {}))
        reward.check(prompts)
        family = views[0].dataset.reference
        if reference is None:
            on_cpu = settings.eval_reference_on_cpu
            reference = _reference(family, policy, torch.device("cpu") if on_cpu else device)
        draws = SamplingSettings(
            responses=1, temperature=settings.eval_temperature, max_new_tokens=limit
        )
        ends = end_token_ids(
            getattr(inner, "generation_config", None),
            tokenizer.eos_token_id,
            Encoder(tokenizer, append_eos=False).end_of_turn,
        )
        rules = DecodingRules(
            processors=logits_processors(draws),
            greedy=draws.temperature == 0,
            end_ids=ends,
            max_new_tokens=limit,
        )
        return cls(tuple(prompts), reward, reference, tokenizer, rules, draws.temperature, seed)

    def for_views(
        self, settings: SampledEvalSettings, views: Iterable[DatasetView], policy: SampledPolicy
    ) -> SampledEvaluator:
        """The evaluator for other held-out groups; arguments and errors as `prepare`."""
        prompts = read_prompts(views, most=settings.eval_prompts, tokenizer=self.tokenizer)
        limit = answer_limit(
            prompts,
            settings.eval_max_new_tokens,
            context=context_length(causal_lm(policy.model).config),
            most_tokens=policy.engine.cost.max_tokens,
        )
        rules = replace(self.rules, max_new_tokens=limit)
        return replace(self, prompts=tuple(prompts), rules=rules)

    def described(self) -> str:
        """What is sampled, in a line."""
        kl = self.reference.unavailable
        return (
            f"{len(self.prompts):,} held-out prompts, answers of at most "
            f"{self.rules.max_new_tokens:,} tokens at temperature {self.temperature:g}; "
            + (f"no KL: {kl}" if kl else f"KL to {self.reference.described}")
        )

    def evaluate(
        self,
        policy: SampledPolicy,
        numbers: range,
        prompts: Sequence[HeldOutPrompt] | None = None,
    ) -> SampledResult:
        """Sample and score answers. All ranks must call this; they share the prompts.

        Args:
            policy: the policy.
            numbers: the numbers of the answers to each prompt. The same numbers give the same
                random numbers, other numbers further answers (`SampledResult.joined`).
            prompts: some of `self.prompts`; default: all.

        Returns:
            The answers of all ranks, on every rank.

        Raises:
            DataError: the model's logits are not finite.
            ConfigError: no answer can be scored, such as by a server that refuses the key.
        """
        chosen = self.prompts if prompts is None else tuple(prompts)
        own = chosen[rank_slice()]
        # Each part has collectives of its own, so an error is exchanged after each of them.
        drawn = raise_together(lambda: self._draw(policy, own, numbers))
        ids = [[np.array(each.ids, np.int32) for each in some] for some in drawn]
        sampled = raise_together(lambda: self._policy_logprobs(policy, own, drawn, ids))
        reference = raise_together(lambda: self.reference.seq_logprobs(policy, own, ids))
        ratios = [mine - theirs for mine, theirs in zip(sampled, reference, strict=True)]
        parts = gather_results(lambda: self._scored(own, drawn, ids, ratios))
        return merged_results(parts, [prompt.key for prompt in chosen])

    def _draw(
        self, policy: SampledPolicy, prompts: Sequence[HeldOutPrompt], numbers: range
    ) -> list[list[Completion]]:
        drawn = [
            [Completion(prompt.token_ids, self._seed(prompt, number)) for number in numbers]
            for prompt in prompts
        ]
        with policy.decoding() as calls:
            decoder = Decoder(
                calls,
                self.rules,
                batch_size=_BATCH_SIZE,
                max_batch_tokens=policy.engine.cost.max_tokens,
            )
            for _ in decoder.run([each for some in drawn for each in some]):
                pass
        return drawn

    def _seed(self, prompt: HeldOutPrompt, number: int) -> int:
        return int(mix_key(self.seed, int(prompt.key[:_KEY_DIGITS], 16), number))

    def _policy_logprobs(
        self,
        policy: SampledPolicy,
        prompts: Sequence[HeldOutPrompt],
        drawn: Sequence[Sequence[Completion]],
        ids: Sequence[Sequence[Int32Array]],
    ) -> list[FloatArray]:
        """Log-probs under the distribution that was sampled from: (m,) for each prompt, nats."""
        if self.temperature == 1:  # computed as the reference's are, so that rounding cancels
            return policy.seq_logprobs(prompts, ids)
        return [np.array([sum(each.logprobs) for each in some]) for some in drawn]

    def _scored(
        self,
        prompts: Sequence[HeldOutPrompt],
        drawn: Sequence[Sequence[Completion]],
        ids: Sequence[Sequence[Int32Array]],
        ratios: Sequence[FloatArray],
    ) -> SampledResult:
        texts = [[self._text(own) for own in some] for some in ids]
        inputs = [fresh_input(*each) for each in zip(prompts, texts, ids, strict=True)]
        scored = self.reward.score(inputs)
        answers = tuple(
            PromptAnswers(
                key=prompt.key,
                group=prompt.logged.group_id,
                prompt=prompt.text,
                best_logged=prompt.logged.responses[0],
                best_reward=prompt.best_reward,
                texts=tuple(own_texts),
                rewards=rewards,
                log_ratios=own_ratios,
                lengths=np.array([len(each) for each in own_ids], np.float64),
                truncated=np.array([each.finish_reason == "length" for each in some], np.float64),
            )
            for prompt, some, own_ids, own_texts, rewards, own_ratios in zip(
                prompts, drawn, ids, texts, scored.rewards, ratios, strict=True
            )
        )
        return SampledResult(answers, dict(scored.causes), self.reference.unavailable)

    def _text(self, ids: Int32Array) -> str:
        tokenizer: Any = self.tokenizer
        text: str = tokenizer.decode(
            ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def check_decodable(policy: SampledPolicy) -> None:
    """Raise ConfigError unless the decoder in this process can run the policy; see
    `Decoder.probe`.
    """
    from transformers import LogitsProcessorList

    rules = DecodingRules(LogitsProcessorList([]), False, frozenset(), 1)
    try:
        with policy.decoding() as calls:
            Decoder(calls, rules, batch_size=2, max_batch_tokens=64).probe()
    except ConfigError as error:
        raise error.replaced(
            remedy="judge by the logged responses (leave eval_samples out), or serve the trained "
            "policy and sample with `gvpo-offline sample` (kind: openai)"
        ) from error.__cause__


def _required(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ConfigError(
            "sampled answers are decoded with the policy's tokenizer",
            received="no tokenizer",
            remedy="pass it as processing_class",
        )
    return tokenizer


def _reference(
    family: ReferenceFamily | None, policy: SampledPolicy, device: torch.device | None
) -> SampledReference:
    if family is None:
        return SampledReference("none", unavailable="the dataset has no reference")
    return find_reference(family, policy, device)
