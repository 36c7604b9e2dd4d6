"""What the metrics of an evaluation mean, in a few words each."""

from __future__ import annotations

METRIC_TEXTS = {
    "loss": "what training minimises; compare it for equal settings alone",
    "explained_variance": "share of reward differences that the log-ratios explain; reference: 0",
    "log_ratio_mean": "mean log-ratio to the reference, nats",
    "log_ratio_std": "standard deviation of log-ratios, nats",
    "best_log_ratio_mean": "log-ratio of each group's best response, nats; should not fall",
    "weight_std": "standard deviation of responses' weights in the gradient",
    "weight_abs_mean": "mean size of these weights",
    "reward_mean": "mean logged reward, over responses",
    "reward_std": "spread of logged rewards within groups",
    "pair_accuracy": "share of pairs that the log-ratios order as the rewards do; chance: 0.5",
    "group_reward_mean": "mean logged reward, over groups",
    "reweighted_reward_mean": "the same with responses weighted by policy/reference",
    "log_mass_mean": "whether logged responses gained (above 0) or lost probability, nats",
    "likely_reward_mean": "as group_reward_mean, of responses that the reference could write",
    "likely_reweighted_reward_mean": "the same with these weighted by policy/reference, capped",
    "likely_log_mass_mean": "as log_mass_mean, of these; far below 0, the policy left the log",
    "likely_share": "share of responses that the reference could write",
    "squares_loss": "the loss without imitation",
    "imitation_loss": "the part of imitation, nats",
}


def explained(name: str, value: float, width: int) -> str:
    """A line with a metric's name, value and meaning; the name is padded to `width`."""
    line = f"  {name:<{width}} {value:>12.5g}"
    text = METRIC_TEXTS.get(name)
    return line if text is None else f"{line}   {text}"
