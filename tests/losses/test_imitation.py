"""Imitation beside losses of squares: worked values, laws, shares, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.losses import LOSS_TYPES, GroupLoss, GroupStatistics, group_loss
from gvpo_offline.losses.imitation import imitated_shares
from gvpo_offline.settings import ANCHORED, SQUARES

BETA = 0.5
# One group: log-probs, reference, rewards. log-ratios 0.5, -0.25, 0.
LOGPROBS, REFERENCE, REWARDS = (-2.0, -4.25, -3.0), (-2.5, -4.0, -3.0), (1.0, 0.0, 1.0)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def call(name: str = "gvpo", alpha: float = 0.0, **changes: Any) -> GroupLoss:
    """The loss of the group above, with changed arguments."""
    given: dict[str, Any] = {
        "seq": tensor(LOGPROBS),
        "ref": tensor(REFERENCE),
        "rewards": tensor(REWARDS),
        "group": torch.zeros(3, dtype=torch.int64),
        "beta": BETA,
        **changes,
    }
    if name in ANCHORED:  # the first two responses are the reference's
        given["reference_rows"] = torch.tensor([True, True, False])
    arrays = [given.pop(key) for key in ("seq", "ref", "rewards", "group")]
    return group_loss(name, *arrays, imitation=alpha, **given)


@pytest.mark.parametrize("name", SQUARES)
def test_with_rewards_of_0_and_1_the_term_is_alpha_beta_times_rft(name: str) -> None:
    """rft is (2 + 3) / 2 = 2.5 nats; alpha 2 at beta 0.5 adds 2 * 0.5 * 1 * 2.5 = 2.5. For ipo it
    is 2 / 0.5^2 = 8 times as much."""
    plain, both, rft = call(name), call(name, 2.0), call("rft")
    assert float(rft.loss) == 2.5
    added = 2.5 * (8 if name == "ipo" else 1)
    assert float(both.loss) == pytest.approx(float(plain.loss) + added, rel=1e-14)
    metrics = both.metrics
    assert metrics["imitation_loss"] == 2.5
    assert metrics["squares_loss"] == pytest.approx(float(plain.loss), rel=1e-14)
    assert "imitation_loss" not in plain.metrics


@pytest.mark.parametrize("name", SQUARES)
def test_the_weights_are_those_of_the_gradient(name: str) -> None:
    """-beta / (k - 1) * w is the gradient in each log-prob."""
    seq = tensor(LOGPROBS).requires_grad_()
    result = call(name, 2.0, seq=seq)
    (gradient,) = torch.autograd.grad(result.loss, seq)
    assert torch.allclose(gradient, -BETA / 2 * result.weights, rtol=1e-12, atol=0)


def test_the_term_grows_with_the_gap_between_rewards() -> None:
    """Rewards 0.75, 0.5, 0.75: the gap is 0.25, so alpha 2 at beta 0.5 adds 2 * 0.5 * 0.25 * 2.5.

    Without the best responses the best of the others are worth what they are above the lowest. ipo
    ignores the size of rewards, and adds what it adds for a gap of 1.
    """
    close = tensor([0.75, 0.5, 0.75])
    added = float(call(alpha=2.0, rewards=close).loss) - float(call(rewards=close).loss)
    assert added == pytest.approx(0.625, rel=1e-14)
    added = float(call("ipo", 2.0, rewards=close).loss) - float(call("ipo", rewards=close).loss)
    assert added == pytest.approx(8 * 2.5, rel=1e-14)
    # The second response, -4.25 nats, is 0.5 above the lowest: 2 * 0.5 * 0.5 * 4.25.
    graded, second = tensor([1.0, 0.5, 0.0]), torch.tensor([False, True, True])
    both = call(alpha=2.0, rewards=graded, imitated=second)
    assert float(both.loss) - float(call(rewards=graded).loss) == pytest.approx(2.125, rel=1e-14)
    assert both.metrics["imitation_loss"] == 4.25


@settings(max_examples=25)
@given(
    beta=st.sampled_from([0.02, 0.5, 3.0]),
    alpha=st.sampled_from([0.0, 0.3, 10.0]),
    seed=st.integers(0, 99),
)
def test_ipo_with_imitation_is_rebel_with_imitation_for_a_gap_of_a_half(
    beta: float, alpha: float, seed: int
) -> None:
    """(d - 1 / (2 beta))^2 = 4 / beta^2 * (1/2 - beta d)^2 / 4, and so for the term: the same alpha
    has the same optimum, also at a small beta."""
    seq, ref, rewards, group = batch_of([[0.5, 0.0], [0.0, 0.5]], seed)
    found, expected = (
        group_loss(name, seq, ref, rewards, group, beta=beta, imitation=alpha)
        for name in ("ipo", "rebel")
    )
    factor = 4 / beta**2
    assert torch.allclose(found.group_losses, factor * expected.group_losses, rtol=1e-12, atol=0)
    assert torch.allclose(found.weights, factor * expected.weights, rtol=1e-12, atol=0)


def documented() -> tuple[str, dict[str, Tensor]]:
    """The text of docs/reference/losses.md, and the rows of its example of imitation."""
    path = Path(__file__).parents[2] / "docs" / "reference" / "losses.md"
    text = path.read_text(encoding="utf-8")
    table = text.split("**An example**")[1].split("| --- | --- | --- | --- |")[1]
    rows = {}
    for line in table.strip().split("\n\n")[0].splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = tensor([float(cell.replace("\N{MINUS SIGN}", "-")) for cell in cells])
    return text, rows


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_example_in_the_documentation(scale: float) -> None:
    """Every number of the table, the two losses in the text, and that alpha has no scale."""
    text, rows = documented()
    given: dict[str, Any] = {
        "seq": rows["log π"].clone().requires_grad_(),
        "ref": rows["log π_ref"],
        "rewards": scale * rows["R"],
        "beta": scale * 0.5,
    }
    assert torch.allclose(rows["l"], rows["log π"] - rows["log π_ref"])
    assert torch.allclose(rows["residual"], rows["R"] - 0.5 * rows["l"])
    plain, both = call(**given), call(alpha=1.0, **given)
    others = call(alpha=1.0, imitated=torch.tensor([False, True, True]), **given)
    (gradient,) = torch.autograd.grad(both.loss, given["seq"])
    for name, found in (
        ("weight", plain.weights / scale),
        ("weight with imitation", both.weights / scale),
        ("weight with imitation of it", others.weights / scale),
        ("gradient", gradient / scale**2),
        ("q", both.terms.imitated_N),
        ("q, without the first's sampler", others.terms.imitated_N),
    ):
        assert found is not None
        assert torch.allclose(found, rows[name], rtol=1e-12, atol=1e-12), name
    for said, loss in (("= 0.03875", plain), ("the loss 3.63875", both)):
        assert said in text
        assert float(loss.loss.detach()) / scale**2 == pytest.approx(
            float(said.split()[-1]), rel=1e-12
        )
    assert "0.5 · 0.3 · 9 = 1.35" in text
    added = float((others.loss - plain.loss).detach()) / scale**2
    assert added == pytest.approx(1.35, rel=1e-12)


@pytest.mark.parametrize("of", ["best", "soft"])
def test_a_group_of_equal_rewards_imitates_nothing(of: str) -> None:
    equal = tensor([0.3, 0.3, 0.3])
    plain, both = call(rewards=equal), call(alpha=3.0, imitation_of=of, rewards=equal)
    assert torch.equal(plain.loss, both.loss)
    assert both.metrics["imitation_loss"] == 0.0


def test_alpha_0_is_the_loss_without_it_bit_for_bit() -> None:
    """Also with the other settings of imitation, which then have no effect."""
    plain = call()
    zero = call(alpha=0.0, imitation_of="soft", imitated=torch.zeros(3, dtype=torch.bool))
    assert torch.equal(plain.loss, zero.loss)
    assert torch.equal(plain.weights, zero.weights)
    assert zero.metrics == plain.metrics


groups_of_rewards = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=5),
    min_size=1,
    max_size=4,
)


def batch_of(rewards: list[list[float]], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, reference log-probs, rewards and group of each response."""
    sizes = [len(own) for own in rewards]
    generator = torch.Generator().manual_seed(seed)
    ref = -20 * torch.rand(sum(sizes), generator=generator, dtype=torch.float64) - 1
    seq = ref + torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return seq, ref, tensor([value for own in rewards for value in own]), group


@settings(max_examples=25)
@given(rewards=groups_of_rewards, seed=st.integers(0, 99), scale=st.sampled_from([0.25, 8.0]))
def test_alpha_does_not_depend_on_the_scale_of_rewards(
    rewards: list[list[float]], seed: int, scale: float
) -> None:
    """Rewards and beta times c: the loss times c^2, with the gradient and so the optimum.

    c is a power of 2, by which float64 multiplies exactly.
    """
    seq, ref, own, group = batch_of(rewards, seed)
    for of in ("best", "soft"):
        how = {"imitation_of": of}
        plain = group_loss("gvpo", seq, ref, own, group, beta=0.5, imitation=0.3, **how)
        scaled = group_loss(
            "gvpo", seq, ref, scale * own, group, beta=scale * 0.5, imitation=0.3, **how
        )
        expected = scale**2 * plain.group_losses
        # rewards / beta is the same, and a power of 2 changes no rounding but that of 0.3 * beta.
        assert torch.allclose(scaled.group_losses, expected, rtol=1e-14, atol=0)


@settings(max_examples=25)
@given(rewards=groups_of_rewards, seed=st.integers(0, 99))
def test_the_share_of_imitation_in_the_gradient_does_not_depend_on_beta(
    rewards: list[list[float]], seed: int
) -> None:
    """At the reference, where w is R - mean R, the weights of both parts are free of beta."""
    _, ref, own, group = batch_of(rewards, seed)
    weights = [
        group_loss("gvpo", ref, ref, own, group, beta=beta, imitation=0.3).weights
        for beta in (0.5, 0.05)
    ]
    assert torch.equal(*weights)


@settings(max_examples=25)
@given(rewards=groups_of_rewards, seed=st.integers(0, 99), constant=st.sampled_from([-4.0, 16.0]))
def test_a_constant_added_to_the_rewards_changes_no_share(
    rewards: list[list[float]], seed: int, constant: float
) -> None:
    seq, ref, own, group = batch_of(rewards, seed)
    for of in ("best", "soft"):
        shares = [shares_of(seq, ref, value, group, of=of) for value in (own, own + constant)]
        assert torch.equal(*shares)  # sums of quarters are exact


def shares_of(
    seq: Tensor,
    ref: Tensor,
    rewards: Tensor,
    group: Tensor,
    *,
    beta: float = 0.5,
    token_counts: Tensor | None = None,
    **how: Any,
) -> Tensor:
    loss = group_loss("gvpo", seq, ref, rewards, group, beta=beta, token_counts=token_counts)
    return imitated_shares(loss.terms, **how)


def test_soft_shares() -> None:
    """softmax of R / beta: e^2, 1, e^2 over their sum; at beta 0.01 the best alone."""
    seq, ref, rewards = tensor(LOGPROBS), tensor(REFERENCE), tensor(REWARDS)
    group = torch.zeros(3, dtype=torch.int64)
    e2 = math.exp(2.0)
    found = shares_of(seq, ref, rewards, group, of="soft")
    assert found.tolist() == pytest.approx([e2 / (2 * e2 + 1), 1 / (2 * e2 + 1), e2 / (2 * e2 + 1)])
    cold = shares_of(seq, ref, rewards, group, of="soft", beta=0.01)
    assert cold.tolist() == pytest.approx([0.5, 0.0, 0.5], abs=1e-40)


def test_shares_by_the_reference() -> None:
    """Per token -2.5 / 5 = -0.5 and -3 / 2 = -1.5: shares e^1 to 1; the second is not a best one.

    soft multiplies these by e^(R / beta), here e^2 for both, and 1 * e^(-4 / 4) for the other.
    """
    seq, ref, rewards = tensor(LOGPROBS), tensor(REFERENCE), tensor(REWARDS)
    group, counts = torch.zeros(3, dtype=torch.int64), torch.tensor([5, 4, 2])
    found = shares_of(seq, ref, rewards, group, weights="reference", token_counts=counts)
    e = math.e
    assert found.tolist() == pytest.approx([e / (1 + e), 0.0, 1 / (1 + e)])
    parts = [math.exp(2 - 0.5), math.exp(-1), math.exp(2 - 1.5)]
    soft = shares_of(seq, ref, rewards, group, of="soft", weights="reference", token_counts=counts)
    assert soft.tolist() == pytest.approx([part / sum(parts) for part in parts])


def test_the_best_of_the_allowed_responses_is_imitated() -> None:
    """Four groups, the first response of each not allowed:

    1.0 | 0.5, 0.0   the second is the best of the others
    1.0 | 0.0, 0.0   the best of the others has the group's lowest reward: nothing
    0.0 | 0.5, 0.5   both others, above the group's lowest
    1.0 | 0.5        (a group of two) nothing: 0.5 is its lowest
    """
    rewards = tensor([1, 0.5, 0, 1, 0, 0, 0, 0.5, 0.5, 1, 0.5])
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
    allowed = torch.tensor([False, True, True] * 3 + [False, True])
    ref = -torch.ones(11, dtype=torch.float64)
    found = shares_of(ref, ref, rewards, group, allowed=allowed)
    assert found.tolist() == [0, 1, 0, 0, 0, 0, 0, 0.5, 0.5, 0, 0]
    nobody = shares_of(ref, ref, rewards, group, allowed=torch.zeros(11, dtype=torch.bool))
    assert nobody.tolist() == [0.0] * 11
    soft = shares_of(ref, ref, rewards, group, of="soft", allowed=allowed)
    assert soft[:3].tolist() == pytest.approx([0, math.e / (1 + math.e), 1 / (1 + math.e)])


@settings(max_examples=25)
@given(rewards=groups_of_rewards, seed=st.integers(0, 99))
def test_shares_sum_to_1_or_0_and_move_with_the_rows(rewards: list[list[float]], seed: int) -> None:
    seq, ref, own, group = batch_of(rewards, seed)
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(len(own), generator=generator) < 0.7
    counts = torch.randint(1, 9, (len(own),), generator=generator)
    order = torch.randperm(len(own), generator=generator)
    for of in ("best", "soft"):
        for weights in ("equal", "reference"):
            how = {"of": of, "weights": weights}
            found = shares_of(seq, ref, own, group, allowed=allowed, token_counts=counts, **how)
            sums = torch.zeros(len(rewards)).double().index_add(0, group, found)
            for value, members in zip(sums.tolist(), rewards, strict=True):
                assert value == pytest.approx(0 if min(members) == max(members) else value)
                assert value == 0 or value == pytest.approx(1.0, rel=1e-14)
            assert not found[~allowed].any()
            other = shares_of(
                seq[order],
                ref[order],
                own[order],
                group[order],
                allowed=allowed[order],
                token_counts=counts[order],
                **how,
            )
            assert torch.allclose(other, found[order], rtol=1e-14, atol=0)


def test_statistics_of_parts_add_up_to_those_of_the_whole() -> None:
    seq, ref, rewards, group = batch_of([[0.0, 1.0], [0.5, 0.5, 0.0], [0.0, 0.0]], 3)
    whole = group_loss("gvpo", seq, ref, rewards, group, beta=0.5, imitation=0.7).statistics
    total = GroupStatistics.zeros()
    for number in range(3):
        rows = group == number
        part = group_loss(
            "gvpo", seq[rows], ref[rows], rewards[rows], group[rows], beta=0.5, imitation=0.7
        )
        total = total + part.statistics
    assert total.metrics() == pytest.approx(whole.metrics(), rel=1e-12)


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf, "much", True])
def test_alpha_is_a_finite_number_of_at_least_0(alpha: Any) -> None:
    with pytest.raises(ConfigError, match="imitation is a finite number of at least 0"):
        call(alpha=alpha)


@pytest.mark.parametrize("name", [n for n in LOSS_TYPES if n not in SQUARES])
def test_other_losses_refuse_it_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="losses of squares") as error:
        call(name, 1.0)
    assert name in str(error.value)


@pytest.mark.parametrize("how", [{"imitation_of": "worst"}, {"imitation_weights": "length"}])
def test_unknown_forms_are_refused(how: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="imitation_"):
        call(alpha=1.0, **how)


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ({"imitation_weights": "reference"}, "needs the number of counted tokens"),
        ({"imitation_weights": "reference", "token_counts": torch.tensor([1, 0, 2])}, "at least 1"),
        ({"imitation_weights": "reference", "token_counts": torch.tensor([1, 2])}, "one entry"),
        ({"imitated": torch.tensor([True])}, "one entry for each"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(how: dict[str, Any], rule: str) -> None:
    with pytest.raises(DataError, match=rule):
        call(alpha=1.0, **how)
