"""Settings of the evaluation by fresh answers. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gvpo_offline.errors import ConfigError

DEFAULT_SAMPLES = 8


@dataclass
class SampledEvalSettings:
    """Fresh answers of the policy to held-out prompts, scored by a reward configuration."""

    eval_samples: int = 0
    """Number of answers to each held-out prompt that are sampled at each evaluation; 0: none. They
    are scored as `eval_reward` says, which gives the metrics sampled_reward, sampled_kl and
    sampled_objective (docs/howto/sampled-evaluation.md)."""
    eval_prompts: int | None = None
    """Largest number of prompts to sample answers to: those with the smallest hashes of their token
    ids, so that every run takes the same ones. Default: all distinct held-out prompts."""
    # A bare dict: jsonargparse would parse strings inside a dict[str, Any] as YAML a second time.
    eval_reward: dict | str | None = None  # type: ignore[type-arg]
    """How sampled answers are scored: the path of the YAML file of `gvpo-offline reward`, or its
    content (scorers, missing). Kinds: function, verl, math, exact, numeric, model, judge."""
    eval_max_new_tokens: int | None = None
    """Largest number of tokens of a sampled answer. Default: the longest logged response to a
    held-out prompt, rounded up."""
    eval_temperature: float = 1.0
    """Temperature of the sampled answers; 0: the likeliest token. The divergence is that of the
    distribution that is sampled from."""
    eval_reference_on_cpu: bool = False
    """Keep the reference model, which sampled_kl needs unless it is the base of the policy's
    adapter, on the CPU: this saves GPU memory and takes longer."""


def check_sampled_settings(settings: SampledEvalSettings) -> None:
    """Check the settings, and read the reward configuration.

    Raises:
        ConfigError: a number is out of range; only one of eval_samples and eval_reward is set; or
            the reward cannot score fresh answers (see `rewards.fresh.fresh_config`).
    """
    for name in ("eval_samples", "eval_prompts", "eval_max_new_tokens"):
        value, least = getattr(settings, name), 0 if name == "eval_samples" else 1
        if value is not None and value < least:
            raise ConfigError(f"{name} is at least {least}", received=value)
    temperature = settings.eval_temperature
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError("eval_temperature is a number that is not negative", received=temperature)
    if settings.eval_samples and not settings.eval_reward:
        raise ConfigError(
            "sampled answers need a reward: eval_reward says how they are scored",
            received=f"eval_samples: {settings.eval_samples} without eval_reward",
            remedy="set eval_reward to the YAML file that `gvpo-offline reward` was run with",
        )
    if settings.eval_reward and not settings.eval_samples:
        raise ConfigError(
            "eval_reward scores sampled answers: eval_samples says how many to draw",
            received="eval_reward without eval_samples",
            remedy=f"set eval_samples: {DEFAULT_SAMPLES}, or leave eval_reward out",
        )
    if settings.eval_samples > 1 and temperature == 0:
        raise ConfigError(
            "at temperature 0 all answers to a prompt are the same",
            received=f"eval_samples: {settings.eval_samples} with eval_temperature: 0",
            remedy="set eval_samples: 1, or a temperature",
        )
    if settings.eval_reward:
        from gvpo_offline.rewards.fresh import fresh_config

        fresh_config(settings.eval_reward)
