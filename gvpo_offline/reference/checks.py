"""Checks of a policy against a dataset and its reference: tokenizer, token ids, lengths, log-probs.

The reference stage and training apply the same checks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NoReturn

from gvpo_offline.collectives import gather_results, rank_slice
from gvpo_offline.compute.adapters import policy_sha256
from gvpo_offline.compute.context import context_length
from gvpo_offline.compute.model import attention_of, device_of, dtype_name, dtype_of
from gvpo_offline.compute.settings import ComputePath
from gvpo_offline.errors import DataError, labelled
from gvpo_offline.rules import LOGPROB_REMEDY, LOGPROB_RULE, check_group
from gvpo_offline.store.arrow import groups_from_table
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import ReferenceFamily
from gvpo_offline.store.schema import TRAINING_COLUMNS
from gvpo_offline.store.survey import Survey
from gvpo_offline.tokenizer import check_same_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Version of how log-probs are computed in 16 bits. 2: products of the head are float32 everywhere.
ARITHMETIC = 2


@dataclass(frozen=True)
class PolicyFacts:
    """Properties of the policy that are compared with those of a reference.

    Attributes:
        weights_sha256: hash of the policy's weights, or None if it was not computed.
        dtype, autocast_dtype, attn_implementation: how its log-probs are computed.
        layout: layout of groups as model input.
        tokenizer_fingerprint: fingerprint of the tokenizer, or None if no tokenizer was given.
        n_embeddings: number of token embeddings, or None if the model does not provide it.
        context_length: the most tokens that the model can read, or None if it has no limit.
        arithmetic: version of the arithmetic in 16 bits, see `ARITHMETIC`; 1 where none changed.
    """

    weights_sha256: str | None
    dtype: str
    autocast_dtype: str | None
    attn_implementation: str
    tokenizer_fingerprint: str | None
    n_embeddings: int | None = None
    layout: str = "padded"
    context_length: int | None = None
    arithmetic: int = 1

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = (
        "weights_sha256 dtype autocast_dtype attn_implementation tokenizer_fingerprint "
        "n_embeddings layout"
    )

    def with_path(self, path: ComputePath) -> PolicyFacts:
        """These facts, with layout and attention implementation of a compute path."""
        return replace(self, layout=path.layout, attn_implementation=path.attention)

    @property
    def coarsest_dtype(self) -> str:
        """The data type that limits the precision of log-probs."""
        return coarsest_dtype(self.dtype, self.autocast_dtype)


def coarsest_dtype(*dtypes: str | None) -> str:
    """The coarsest of some data types; names such as `bfloat16+nf4` consist of several."""
    found = {part for name in dtypes if name for part in name.split("+")}
    return next((d for d in ("int8", "bfloat16", "float16") if d in found), "float32")


def policy_facts(
    model: torch.nn.Module,
    *,
    hash_weights: bool = True,
    autocast: torch.dtype | None,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device | None = None,
) -> PolicyFacts:
    """The facts of a model that will compute log-probs.

    Args:
        model: the policy.
        hash_weights: whether to hash the weights, which reads all of them.
        autocast: data type of autocast, or None.
        tokenizer: the policy's tokenizer, or None.
        device: where it will compute; default: where it is.
    """
    own, of_autocast = dtype_of(model), dtype_name(autocast)
    on_cuda = (device or device_of(model)).type == "cuda"
    same_as_before = on_cuda or coarsest_dtype(own, of_autocast) == "float32"
    return PolicyFacts(
        weights_sha256=policy_sha256(model) if hash_weights else None,
        dtype=own,
        autocast_dtype=of_autocast,
        attn_implementation=attention_of(model),
        tokenizer_fingerprint=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        n_embeddings=_n_embeddings(model),
        context_length=context_length(getattr(model, "config", None)),
        arithmetic=1 if same_as_before else ARITHMETIC,
    )


def _n_embeddings(model: torch.nn.Module) -> int | None:
    try:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    return getattr(embeddings, "num_embeddings", None)


def check_tokenizers(datasets: Iterable[GroupDataset], policy: PolicyFacts) -> None:
    """Raise IntegrityError unless dataset, reference and policy use the same tokenizer."""
    for dataset in datasets:
        made_by = dataset.manifest.tokenizer
        base = made_by.fingerprint if made_by else None
        if dataset.reference is not None:
            check_same_tokenizer(
                base,
                "the dataset",
                dataset.reference.tokenizer_fingerprint,
                f"reference {dataset.reference.fingerprint[:12]}",
                file=dataset.root,
            )
        check_same_tokenizer(
            base, "the dataset", policy.tokenizer_fingerprint, "the policy", file=dataset.root
        )
        if base is None or policy.tokenizer_fingerprint is None:
            why = (
                "the dataset records no tokenizer"
                if base is None
                else "no processing_class was given"
            )
            logger.warning(
                "cannot compare the tokenizers of %s and the policy: %s",
                labelled(dataset.root),
                why,
            )


def check_token_ids(datasets: Iterable[GroupDataset], policy: PolicyFacts) -> None:
    """Raise DataError, naming file, row and group, if the policy has no embedding for a token id.

    If the manifest records a tokenizer, its vocabulary size is compared, because token ids were
    checked against it when the dataset was written. Otherwise all token ids are read once.
    """
    if policy.n_embeddings is None:
        return
    for dataset in datasets:
        made_by = dataset.manifest.tokenizer
        if made_by is not None and made_by.vocab_size <= policy.n_embeddings:
            continue
        gather_results(functools.partial(_check_token_ids, dataset, policy.n_embeddings))


def _check_token_ids(dataset: GroupDataset, vocab_size: int) -> None:
    for row_group in range(dataset.n_row_groups)[rank_slice()]:
        place = dataset.location(row_group)
        groups = groups_from_table(dataset.table(row_group, TRAINING_COLUMNS))
        for row, group in enumerate(groups, place.first_row):
            check_group(group, file=place.file, row=row, vocab_size=vocab_size)


def check_row_tokens(dataset: GroupDataset, counts: Survey, max_tokens: int) -> None:
    """Raise DataError, naming file, row and group, if a prompt with one response is too long.

    Args:
        dataset: the dataset.
        counts: its survey, which gives the longest row.
        max_tokens: largest number of tokens of a forward pass (max_tokens_per_micro_batch).
    """
    # A response's last token predicts nothing and is not in the input.
    if counts.max_row_tokens - 1 <= max_tokens:
        return
    row_group, row, group_id = counts.longest_row
    place = dataset.location(row_group)
    raise DataError(
        "a prompt and one of its responses fit into max_tokens_per_micro_batch",
        received=f"{counts.max_row_tokens - 1:,} tokens, more than {max_tokens:,}",
        remedy="raise max_tokens_per_micro_batch, or exclude responses of that length at import",
        file=place.file,
        row=place.first_row + row,
        group=group_id,
    )


def check_covered(dataset: GroupDataset, counts: Survey) -> None:
    """Raise DataError if a selected response has no reward or no log-prob of the reference, or a
    log-prob that no model can have given.

    Args:
        dataset: the dataset, with its reference.
        counts: survey of the selected groups and responses.
    """
    if counts.first_impossible is not None:
        row_group, row, group_id = counts.first_impossible
        place = dataset.location(row_group, "ref_seq_logprobs")
        table = dataset.table(row_group, ["ref_seq_logprobs"])
        raise DataError(
            LOGPROB_RULE,
            received=f"{table.column('ref_seq_logprobs')[row].as_py()} for its responses",
            remedy=LOGPROB_REMEDY,
            file=place.file,
            row=place.first_row + row,
            group=group_id,
        )
    if counts.first_unrewarded is not None:
        _refuse_unrewarded(dataset, counts, counts.first_unrewarded)
    if counts.first_unscored is None:
        return
    assert dataset.reference is not None  # only a reference leaves responses unscored
    selection, partial = dataset.reference.selection, dataset.reference.partial
    row_group, row, group_id = counts.first_unscored
    place = dataset.location(row_group, "ref_seq_logprobs")
    raise DataError(
        "the reference has a log-prob of every selected response",
        received=f"none for {counts.unscored_responses:,} of {counts.n_responses:,} responses, in "
        f"{counts.unscored_groups:,} of {counts.n_groups:,} groups; reference "
        f"{dataset.reference.fingerprint[:12]} was scored for "
        f"{selection.text if selection else 'every response'}"
        + (", before a merge added others" if partial else ""),
        remedy=_MISSING_REFERENCE
        if partial
        else "select responses that it was scored for, or run `gvpo-offline reference` with the "
        "where, responses and reward of this run, or without where and responses",
        file=place.file,
        row=place.first_row + row,
        group=group_id,
    )


_MISSING_REFERENCE = (
    "score what is new with `gvpo-offline reference --only_missing true` and the settings of "
    "that reference; or leave these groups out with where: has_reference, which prints how many "
    "they are"
)


def _refuse_unrewarded(
    dataset: GroupDataset, counts: Survey, first: tuple[int, int, str]
) -> NoReturn:
    """Raise DataError about responses without a reward; `first`: the first group with one."""
    row_group, row, group_id = first
    place = dataset.location(row_group, "rewards")
    names = ", ".join(f"{r.family.name}@{r.family.version}" for r in dataset.rewards)
    raise DataError(
        "every selected response has a reward",
        received=f"none for {counts.unrewarded_responses:,} of {counts.n_responses:,} responses, "
        f"in {counts.unrewarded_groups:,} of {counts.n_groups:,} groups; a merge added them "
        f"without reward {names}",
        remedy="score what is new with `gvpo-offline reward --only_missing true` and the settings "
        "of that reward; or leave these groups out with where: has_rewards, which prints how many "
        "they are",
        file=place.file,
        row=place.first_row + row,
        group=group_id,
    )


def check_context(surveyed: Iterable[tuple[GroupDataset, Survey]], policy: PolicyFacts) -> None:
    """Raise DataError if a prompt with one response is longer than the policy's context.

    Args:
        surveyed: datasets with the surveys of what is used of them.
        policy: facts of the policy.

    Raises:
        DataError: names the longest one of all datasets, with its file, row and group.
    """
    longest = max(surveyed, key=lambda item: item[1].max_row_tokens, default=None)
    limit = policy.context_length
    # A response's last token predicts nothing and is not in the input.
    if longest is None or limit is None or longest[1].max_row_tokens - 1 <= limit:
        return
    dataset, counts = longest
    row_group, row, group_id = counts.longest_row
    place = dataset.location(row_group)
    raise DataError(
        f"a prompt and one of its responses fit into the {limit:,} positions of the model",
        received=f"up to {counts.max_row_tokens - 1:,} tokens in {dataset.root}",
        remedy="leave longer groups out (where: prompt_length + response_length_max <= "
        f"{limit}; or max_length: {limit} at import), or use a model with a longer context",
        file=place.file,
        row=place.first_row + row,
        group=group_id,
    )


def reference_differences(policy: PolicyFacts, reference: ReferenceFamily) -> list[str]:
    """A sentence for each setting that differs between the policy and the scored reference."""
    pairs: list[tuple[str, object, object]] = [
        ("dtype", reference.dtype, policy.dtype),
        ("autocast dtype", reference.autocast_dtype, policy.autocast_dtype),
    ]
    if policy.coarsest_dtype != "float32":  # in float32 these only change rounding
        pairs += [
            ("attention", reference.attn_implementation, policy.attn_implementation),
            ("layout", reference.layout, policy.layout),
        ]
        if coarsest_dtype(reference.dtype, reference.autocast_dtype) != "float32":
            ours = policy.arithmetic
            pairs.append(("version of 16-bit arithmetic", reference.arithmetic, ours))
    return [
        f"the reference was scored with {name} {theirs}, the policy runs with {ours}"
        for name, theirs, ours in pairs
        if reference.dtype != "unknown" and theirs not in ("unknown", ours)
    ]


def reference_warnings(policy: PolicyFacts, reference: ReferenceFamily) -> list[str]:
    """Warnings, one for each setting that differs between the policy and the scored reference."""
    return [
        f"{line}, which adds noise to log-ratios; score the reference again with the same setting"
        for line in reference_differences(policy, reference)
    ]
