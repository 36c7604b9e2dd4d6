"""Log-strengths from pairwise comparisons: Bradley and Terry (1952), fitted by Newton's method."""

from __future__ import annotations

import numpy as np

from gvpo_offline.group import FloatArray

_STEPS = 100
_TOLERANCE = 1e-9  # nats


def log_strengths(wins: FloatArray, prior: float) -> FloatArray:
    """Maximise sum_ij w_ij log sigmoid(s_i - s_j), with `prior` ties added to each compared pair.

    With the ties each response of a compared pair has wins over the other, so the maximum exists,
    and is unique up to a constant, if and only if the comparisons connect all responses. For two
    responses it is
    s_0 - s_1 = log((w_01 + prior / 2) / (w_10 + prior / 2)).

    Args:
        wins: (n, n); how often i beat j, a tie as half a win of each. Must be `connected`.
        prior: number of ties added to each compared pair, positive.

    Returns:
        (n,) in nats, of mean 0.
    """
    compared = wins + wins.T > 0
    wins = wins + prior / 2 * compared
    games = wins + wins.T
    n = len(wins)
    strengths = np.zeros(n)
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(strengths[np.newaxis] - strengths[:, np.newaxis]))  # (i beats j)
        gradient = (wins - games * chance).sum(axis=1)
        weights = games * chance * chance.T
        # A graph Laplacian, singular for constants; adding 1 / n fixes the mean at 0.
        curvature = np.diag(weights.sum(axis=1)) - weights + 1 / n
        step = np.linalg.solve(curvature, gradient)
        strengths = strengths + _damping(wins, strengths, step, float(gradient @ step)) * step
        if np.abs(step).max() <= _TOLERANCE:
            centred: FloatArray = strengths - strengths.mean()
            return centred
    raise ArithmeticError(f"Newton's method does not converge for {wins.tolist()}")


def _damping(wins: FloatArray, strengths: FloatArray, step: FloatArray, slope: float) -> float:
    """Backtracking line search: the largest of 1, 1/2, 1/4 … with sufficient increase (Armijo)."""
    before, share = _log_likelihood(wins, strengths), 1.0
    rounding = 1e-14 * abs(before)
    while _log_likelihood(wins, strengths + share * step) < before + 0.1 * share * slope - rounding:
        share /= 2
    return share


def _log_likelihood(wins: FloatArray, strengths: FloatArray) -> float:
    gaps = strengths[:, np.newaxis] - strengths[np.newaxis]
    return -float((wins * np.logaddexp(0, -gaps)).sum())


def connected(compared: FloatArray) -> bool:
    """Whether comparisons connect all n responses; (n, n), positive for a compared pair."""
    n = len(compared)
    linked = (compared + compared.T > 0) | np.eye(n, dtype=bool)
    return bool(np.linalg.matrix_power(linked, n).all())  # of bools: paths of at most n links
