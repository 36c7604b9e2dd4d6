"""Which losses, imitations and betas a search by sampled answers tries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_offline.errors import ConfigError
from gvpo_offline.identity import defaults_of
from gvpo_offline.settings import ANCHORED, LINKED, SQUARES
from gvpo_offline.train.settings import GVPOSettings
from gvpo_offline.tune.judged import LossCandidates
from gvpo_offline.tune.settings import TuneSettings

# The losses in which neither beta nor the reference occurs.
WITHOUT_BETA = ("rft", "topr", "sft", "asymre")
# Settings of the objective that not every loss has, with the losses that have them.
_OF_LOSSES = {
    "anchor": ("gvpo",),
    "response_weights": ("gvpo",),
    "link": LINKED,
    "reference_sampler": ANCHORED,
    "asymre_delta": ("asymre",),
}


def loss_candidates(
    tune: TuneSettings, *, loss_type: str, imitation: float, beta: float
) -> list[LossCandidates]:
    """The losses to try in order, with candidates for their settings.

    Losses to which imitation cannot be added get 0, and losses without beta the candidate nearest
    to judge_beta, which has no effect.

    Args:
        tune: the settings of the search.
        loss_type, imitation, beta: the settings of the run, used where a list is empty.

    Raises:
        ConfigError: imitations are given, and no loss accepts imitation.
    """
    losses = tune.losses or [loss_type]
    if tune.imitations and not set(losses) & set(SQUARES):
        raise ConfigError(
            f"imitation is added to losses of squares: {', '.join(SQUARES)}",
            received=f"imitations with {', '.join(losses)} only",
            remedy="leave imitations out, or try one of these losses too",
        )
    judge_beta = tune.judge_beta or beta
    betas = tuple(tune.betas) or (beta,)
    return [
        LossCandidates(
            loss,
            (tuple(tune.imitations) or (imitation,)) if loss in SQUARES else (0.0,),
            (nearest(betas, judge_beta),) if loss in WITHOUT_BETA else betas,
        )
        for loss in losses
    ]


def nearest(betas: Sequence[float], judge_beta: float) -> float:
    """The beta nearest to `judge_beta`, in logarithms."""
    return min(betas, key=lambda own: abs(math.log(own / judge_beta)))


def settings_of_loss(loss_type: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that not every loss has: their defaults where a loss has them not.

    Args:
        loss_type: name of the loss.
        run: the settings of the run, by name.
    """
    defaults = defaults_of(GVPOSettings)
    return {
        name: run[name] if loss_type in losses else defaults[name]
        for name, losses in _OF_LOSSES.items()
    }
