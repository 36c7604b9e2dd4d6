"""A few answers beside the best logged ones, for logs and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gvpo_offline.sampled_eval.prompts import HeldOutPrompt
from gvpo_offline.sampled_eval.result import SampledResult, finite_or_none
from gvpo_offline.visible import visible

_SHOWN_CHARACTERS = 240
MOST_SHOWN = 16  # prompts of an evaluation whose answers are kept as texts
COLUMNS = ("prompt", "answer", "reward", "best_logged", "best_logged_reward")


@dataclass(frozen=True)
class ShownAnswer:
    """The first answer to a prompt, and the best logged response.

    Attributes:
        prompt, answer, best_logged: texts.
        reward: of the answer; nan if it could not be scored.
        best_logged_reward: in the dataset, where another reward may be used.
    """

    prompt: str
    answer: str
    reward: float
    best_logged: str
    best_logged_reward: float

    def line(self) -> str:
        """In one line, with long texts cut."""
        reward = "no reward" if math.isnan(self.reward) else f"reward {self.reward:.3g}"
        return (
            f"prompt: {_short(self.prompt)} | answer ({reward}): {_short(self.answer)} | "
            f"best logged (reward {self.best_logged_reward:.3g}): {_short(self.best_logged)}"
        )

    def row(self) -> list[str | float]:
        """The values of `COLUMNS`."""
        return [
            self.prompt,
            self.answer,
            self.reward,
            self.best_logged,
            self.best_logged_reward,
        ]


def shown_answers(result: SampledResult, most: int = 3) -> list[ShownAnswer]:
    """The first answer to each of the first prompts."""
    return [
        ShownAnswer(
            own.prompt, own.texts[0], float(own.rewards[0]), own.best_logged, own.best_reward
        )
        for own in result.prompts[:most]
        if own.texts
    ]


def sample_lines(
    result: SampledResult, prompts: Mapping[str, HeldOutPrompt], most: int = MOST_SHOWN
) -> list[dict[str, Any]]:
    """The first answer to each of the first prompts as plain data, for `samples.jsonl`.

    Args:
        result: the answers.
        prompts: what was sampled from, by key.
        most: number of prompts.

    Returns:
        For each prompt: `prompt_key`, its SHA-256; `group_id` of its first group; `prompt`, its
        text; `messages` if it is a chat; `answer`, `reward` (None: it could not be scored), `kl`
        (the answer's log-ratio, nats; None: no reference), `length` in tokens and `truncated`;
        `best_logged` and `best_logged_reward` of the dataset.
    """
    return [
        {
            "prompt_key": own.key,
            "group_id": own.group,
            "prompt": own.prompt,
            "messages": prompts[own.key].logged.messages,
            "answer": own.texts[0],
            "reward": finite_or_none(float(own.rewards[0])),
            "kl": finite_or_none(float(own.log_ratios[0])),
            "length": int(own.lengths[0]),
            "truncated": bool(own.truncated[0]),
            "best_logged": own.best_logged,
            "best_logged_reward": float(own.best_reward),
        }
        for own in result.prompts[:most]
        if own.texts
    ]


def markdown_table(answers: list[ShownAnswer]) -> str:
    """The answers as a table in Markdown."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for each in answers:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else _cell(cell) for cell in each.row()]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def sampled_lines(result: SampledResult, beta: float, most: int = 3) -> list[str]:
    """A result as lines of text: estimates with standard errors over prompts, and a few answers."""
    metrics = result.metrics(beta)

    def estimate(name: str) -> str:
        return f"{metrics[name]:.5g} ± {metrics[f'{name}_se']:.2g}"

    kl = f"no KL: {result.no_kl}"
    if not result.no_kl:
        kl = (
            f"KL {estimate('sampled_kl')} nats, reward - {beta:g} KL "
            f"{estimate('sampled_objective')}"
        )
    cut = 100 * metrics["sampled_truncated"]
    lines = [
        f"{result.n_answers:,} fresh answers to {len(result.prompts):,} prompts:",
        f"  reward {estimate('sampled_reward')}, {kl}",
        f"  mean length {metrics['sampled_length']:.1f} tokens, {cut:.1f}% cut at the limit",
        *failure_lines(result),
    ]
    return [*lines, *(f"  {each.line()}" for each in shown_answers(result, most))]


def failure_lines(result: SampledResult, most: int = 3) -> list[str]:
    """How many answers have no reward and why, the most frequent causes first; [] if all have."""
    failed = sum(result.causes.values())
    if not failed:
        return []
    causes = sorted(result.causes.items(), key=lambda item: -item[1])[:most]
    shown = "; ".join(f"{n} x {visible(cause)}" for cause, n in causes)
    return [
        f"  {failed:,} of {result.n_answers:,} answers have no reward and are left out: {shown}"
    ]


def _short(text: str) -> str:
    text = visible(" ".join(text.split()))
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _cell(text: str) -> str:
    return visible(text).replace("|", "\\|").replace("\n", "<br>")
