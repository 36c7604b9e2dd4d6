"""The rules of `validate`, by name: severity, meaning, remedy, and the thresholds that set them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gvpo_offline.findings.finding import Severity

Kind = Literal["integrity", "light", "full"]


@dataclass(frozen=True)
class Rule:
    """A rule of `validate`.

    Attributes:
        name: of lower-case letters and hyphens; it stays in later versions.
        severity: of its findings, unless the thresholds give another.
        kind: what it reads. "integrity": every byte; "light": summary columns and sidecars;
            "full": tokens.
        meaning: what holds where it finds nothing, as a full clause.
        remedy: what to do about a finding.
        thresholds: the fields of `Thresholds` that say when it finds something; none: at once.
    """

    name: str
    severity: Severity
    kind: Kind
    meaning: str
    remedy: str
    thresholds: tuple[str, ...] = ()


_RULES = (
    Rule(
        "integrity",
        "error",
        "integrity",
        "every file is complete and unaltered, and every sidecar belongs to its groups file",
        "restore the file from a copy, or write it again with the command that made it",
    ),
    Rule(
        "invalid-data",
        "error",
        "integrity",
        "every group has at least 2 responses, finite numbers, and columns of the right lengths",
        "leave the group out of the log, or correct it, and import the log again",
    ),
    Rule(
        "no-groups",
        "error",
        "light",
        "a dataset has at least one group",
        "add responses for its prompts with `gvpo-offline sample` or `gvpo-offline merge`",
    ),
    Rule(
        "few-groups",
        "warning",
        "light",
        "there are groups for several steps of training, and some to hold out",
        "import more prompts, or lower groups_per_step",
        ("min_groups",),
    ),
    Rule(
        "small-groups",
        "warning",
        "light",
        "every group has as many responses as the threshold asks for",
        "sample further responses for these prompts and merge them, or leave the groups out with "
        "`where: group_size >= N`",
        ("min_group_size",),
    ),
    Rule(
        "large-group",
        "warning",
        "light",
        "no group has far more tokens than the others",
        "look at the group with `gvpo-offline show --group ID`: prompts that are no prompts (an "
        "empty text, a constant) collect the responses of a whole log. Leave it out with `where`, "
        "or keep some of its responses with `responses.max_responses`",
        ("max_group_tokens_ratio",),
    ),
    Rule(
        "repeated-prompts",
        "warning",
        "light",
        "each prompt stands in one group",
        "import the log again, which makes one group of each prompt, or merge the dataset with "
        "`match: prompt`; keep held_out_by at prompt, so that no prompt is on both sides",
        ("max_repeated_prompts",),
    ),
    Rule(
        "incomplete-groups",
        "warning",
        "light",
        "most prompts have at least two responses",
        "sample responses for these prompts (`gvpo-offline sample` with this dataset as inputs) "
        "and merge both datasets",
        ("max_incomplete_share",),
    ),
    Rule(
        "truncated-responses",
        "warning",
        "light",
        "few responses were cut at a limit of tokens",
        "sample again with a larger limit, or leave the groups out with "
        "`where: NOT ARRAY_CONTAINS(truncated, TRUE)`: a response without its end teaches the "
        "policy not to end",
        ("max_truncated",),
    ),
    Rule(
        "truncated-best",
        "warning",
        "light",
        "the best response of a group is a complete one",
        "check the scorer, which rewards answers that were cut, and reward them again; or leave "
        "the groups out with `where: NOT ARRAY_CONTAINS(truncated, TRUE)`",
        ("max_truncated_best_share",),
    ),
    Rule(
        "no-reward-signal",
        "error",
        "light",
        "some group has responses of different rewards",
        "check the scorer: it gives every response of a group the same reward, so that the "
        "optimum is the reference and nothing can be learned",
    ),
    Rule(
        "equal-rewards",
        "warning",
        "light",
        "in most groups some response is better than another",
        "sample more responses or at a higher temperature, use a finer reward, or train without "
        "these groups (drop_equal_rewards); their target is the reference",
        ("max_equal_reward_share",),
    ),
    Rule(
        "all-wrong-groups",
        "note",
        "light",
        "in most groups some response has more than the lowest reward",
        "train with `imitation: auto` or `loss_type: rft`, which learn from the few right "
        "responses (docs/evidence/results.md), and sample more responses for these prompts",
        ("max_all_wrong_share",),
    ),
    Rule(
        "constant-reward-sampler",
        "warning",
        "light",
        "every sampler has responses of different rewards",
        "check that its responses were scored as the others were; the policy would learn who "
        "wrote a response instead of what is good in it",
        ("max_constant_reward_samplers",),
    ),
    Rule(
        "reward-follows-sampler",
        "warning",
        "light",
        "the sampler's name explains only part of the rewards within groups",
        "check that the reward is of the response and not of its sampler; otherwise train on the "
        "responses of fewer samplers (responses.samplers), or use `gvpo-offline reward` for a "
        "reward that reads the text",
        ("max_sampler_reward_share",),
    ),
    Rule(
        "reward-follows-length",
        "warning",
        "light",
        "the length of a response explains only part of the rewards within groups",
        "check the scorer for a preference for long or short answers; otherwise the policy learns "
        "a length",
        ("max_reward_length_correlation",),
    ),
    Rule(
        "reward-scale",
        "warning",
        "light",
        "rewards within a group differ by an amount that some usual beta fits",
        "scale the rewards (`weight` of a scorer), to differences of about 1, or choose beta for "
        "the scale: the optimum's log-ratios are differences of reward divided by beta",
        ("min_reward_gap", "max_reward_gap"),
    ),
    Rule(
        "reward-outliers",
        "warning",
        "light",
        "no reward is far from the others of its group, by the scale of other groups",
        "look at the group: a number such as -9999 may stand for a failed scorer. Correct it, or "
        "leave the response out; squares give such a group the weight of thousands",
        ("max_reward_gap_ratio",),
    ),
    Rule(
        "mixed-reward-scales",
        "warning",
        "light",
        "all sources and all samplers have rewards of one scale",
        "bring the rewards of the log to one scale and import it again, or score every response "
        "anew with `gvpo-offline reward`",
        ("max_reward_scale_ratio",),
    ),
    Rule(
        "missing-components",
        "warning",
        "light",
        "each component of a reward has a number for most responses",
        "find out why the scorer gave none (NaN), and run `gvpo-offline reward` again",
        ("max_missing_components",),
    ),
    Rule(
        "missing-rewards",
        "note",
        "light",
        "the dataset has a reward",
        "compute one with `gvpo-offline reward`, or import a log that has a column of rewards",
    ),
    Rule(
        "missing-reference",
        "note",
        "light",
        "the dataset has log-probs of a reference",
        "score them with `gvpo-offline reference`",
    ),
    Rule(
        "unscored-responses",
        "warning",
        "light",
        "the reference has a log-prob of every response",
        "run `gvpo-offline reference` without where and responses, or train with the same "
        "selection as the reference",
        ("max_unscored_share",),
    ),
    Rule(
        "positive-logprobs",
        "error",
        "light",
        "a log-prob is at most 0, and at least -131,072 nats a token",
        "score the reference again: these numbers are no log-probs (negated, a loss, or an "
        "overflowing number)",
    ),
    Rule(
        "certain-responses",
        "warning",
        "light",
        "the reference is not certain of whole responses",
        "check how the log-probs were made: zeros stand for missing numbers in many logs. Score "
        "the reference again",
        ("max_certain_share",),
    ),
    Rule(
        "unlikely-responses",
        "warning",
        "light",
        "the reference could have written most responses of each sampler",
        "check with `gvpo-offline show` that the tokens are those that the reference's tokenizer "
        "and chat template make, and that the reference is the model that you mean to train",
        ("max_unlikely_share", "min_token_logprob"),
    ),
    Rule(
        "unknown-tokenizer",
        "warning",
        "light",
        "the dataset records the tokenizer of its token ids",
        "import the log with tokenizer_name_or_path: otherwise nothing can tell whether the "
        "policy reads the ids as they were meant",
    ),
    Rule(
        "other-tokenizer",
        "error",
        "light",
        "the reference was scored with the tokenizer of the dataset",
        "score the reference with the tokenizer of the dataset, or import the log again",
    ),
    Rule(
        "older-import",
        "warning",
        "light",
        "the groups were imported as the present version imports them",
        "import the log again to have what the present version makes of it",
    ),
    Rule(
        "sampler-settings",
        "warning",
        "light",
        "one name of a sampler has one set of settings",
        "give the two samplers different names (`sampler`, or a column of names) and import again",
    ),
    Rule(
        "missing-columns",
        "note",
        "light",
        "the groups files store lengths, samplers, truncation and prompt hashes",
        "import or compact the dataset, which writes these columns; without them the light checks "
        "read the tokens, and samplers and truncation that no file records are not known",
    ),
    Rule(
        "duplicate-responses",
        "warning",
        "full",
        "the responses of a group differ",
        "sample at a higher temperature, or remove copies from the log: a copy doubles the weight "
        "of a response and adds no knowledge",
        ("max_duplicate_responses",),
    ),
    Rule(
        "contradictory-duplicates",
        "warning",
        "full",
        "the same response to the same prompt has one reward",
        "find out what makes the scorer disagree with itself: noise, or something that it sees "
        "and the policy does not",
        ("max_contradictory_share",),
    ),
    Rule(
        "empty-responses",
        "warning",
        "full",
        "a response holds more than its end token",
        "leave them out at import (empty_responses: drop), or find out why the sampler said "
        "nothing",
        ("max_empty_share",),
    ),
    Rule(
        "missing-end-token",
        "warning",
        "full",
        "a response that was not truncated ends with the token that ends a turn",
        "import with the chat template of the policy, which writes the end token, or mark the "
        "responses as truncated: without it the policy does not learn to stop",
        ("max_missing_end_share",),
    ),
    Rule(
        "repeated-end-token",
        "warning",
        "full",
        "a response has its end token once",
        "remove the end token from the texts of the log; the chat template writes it",
        ("max_repeated_end_share",),
    ),
    Rule(
        "prompt-in-response",
        "warning",
        "full",
        "a response holds the answer, without the prompt before it",
        "cut the prompt from the responses of the log (a text generation that returns the full "
        "text writes both), and import again",
        ("max_prompt_in_response",),
    ),
    Rule(
        "unlikely-first-tokens",
        "warning",
        "full",
        "the reference could have begun most responses as they begin",
        "compare prompt and response with `gvpo-offline show`: a wrong chat template, a missing "
        "generation prompt or a space too many before the response betrays itself in the first "
        "token",
        ("max_unlikely_first_share", "min_token_logprob"),
    ),
    Rule(
        "unlikely-end-tokens",
        "warning",
        "full",
        "the reference could have ended most complete responses as they end",
        "check with `gvpo-offline show` that the end token is the one of the reference's chat "
        "template; a base model may never have seen it",
        ("max_unlikely_end_share", "min_token_logprob"),
    ),
    Rule(
        "missing-generation-prompt",
        "warning",
        "full",
        "a prompt of chat messages ends with the beginning of the answer",
        "import the log again with a chat template that has add_generation_prompt",
        ("max_missing_generation_prompt",),
    ),
    Rule(
        "mask-counts-everything",
        "warning",
        "full",
        "a loss mask leaves out what the policy did not write",
        "check where the mask came from: with tool outputs or further user turns in the response, "
        "it should be false there; otherwise leave the column out",
        ("max_full_masks",),
    ),
    Rule(
        "mask-counts-little",
        "warning",
        "full",
        "the loss mask counts a fair part of the tokens",
        "check whether the mask is inverted: true is what the policy wrote",
        ("min_counted_share",),
    ),
)
RULES: dict[str, Rule] = {rule.name: rule for rule in _RULES}
