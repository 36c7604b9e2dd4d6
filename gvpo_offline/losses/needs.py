"""Inputs that some losses need besides policy, reference and rewards, and errors without them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gvpo_offline.errors import DataError
from gvpo_offline.losses.checks import require
from gvpo_offline.losses.terms import GroupTerms


def needed_inputs(loss_type: str, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those of the optional inputs that a loss uses.

    Args:
        loss_type: name of the loss.
        given: `sampler_logprobs` and `reference_rows`, as `group_loss`.

    Raises:
        DataError: an input that the loss requires is None.
    """
    uses = {"topr": ("sampler_logprobs",), "qrpo": ("reference_rows",)}.get(loss_type, ())
    if loss_type == "oapl":
        known = given["reference_rows"] is not None
        uses = ("reference_rows",) if known else ("sampler_logprobs",)
    used = {}
    for name in uses:
        values = given[name]
        if values is None:
            raise DataError(_RULES[loss_type], received="none", remedy=_REMEDIES[loss_type])
        used[name] = values
    return used


_RULES = {
    "topr": "topr needs the log-probs of the samplers",
    "oapl": "oapl needs responses of the reference, or the log-probs of the samplers, to estimate "
    "the value V* of a prompt",
    "qrpo": "qrpo needs the rewards of responses of the reference",
}
_REMEDIES = {
    "topr": "import a log that has them, or choose another loss_type",
    "oapl": "set reference_sampler to the sampler that is the reference, import a log with the "
    "samplers' log-probs, or set loss_type to gvpo, which needs no V*",
    "qrpo": "set reference_sampler to the sampler that is the reference, or set loss_type to gvpo, "
    "which needs no quantiles",
}


def check_references(terms: GroupTerms, group_index: Tensor) -> None:
    """Raise DataError if a group has no response of the reference, where the loss uses these.

    Args:
        terms: the checked inputs.
        group_index: (N,) the ids of the groups.
    """
    if terms.reference_N is None:
        return
    counts_G = terms.sum(terms.reference_N.double())
    require(counts_G > 0, lambda: _raise_without(counts_G, terms, group_index))


def _raise_without(counts_G: Tensor, terms: GroupTerms, group_index: Tensor) -> None:
    row = int((terms.group_N == int((counts_G == 0).nonzero()[0])).nonzero()[0])
    raise DataError(
        "each group has a response of the reference, of which value and quantiles are estimated",
        received="none",
        remedy="sample such responses and merge them, leave the group out, or set loss_type to "
        "gvpo",
        row=row,
        group=str(int(group_index[row])),
    )
