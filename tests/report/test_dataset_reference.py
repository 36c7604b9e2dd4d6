"""Facts about the reference, duplicates and cost, each computed a second way."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import (
    build_dataset,
    make_group,
    make_groups,
    ref_token_logprobs,
    reference_family,
    reference_sidecar,
)

from gvpo_offline.group import Group
from gvpo_offline.losses import likelihood
from gvpo_offline.losses.terms import GroupTerms
from gvpo_offline.plan.config_file import model_shape
from gvpo_offline.plan.memory import TrainingShape, step_bytes
from gvpo_offline.plan.shapes import ModelShape, shape_of_config
from gvpo_offline.report.dataset.collect import Collected, collect
from gvpo_offline.report.dataset.cost import LAYOUTS
from gvpo_offline.report.dataset.estimate import estimated
from gvpo_offline.report.dataset.near import SampledGroup, near_facts, runs_of
from gvpo_offline.report.dataset.opened import open_for_report
from gvpo_offline.report.dataset.positions import EDGES
from gvpo_offline.report.dataset.reference import SLACK, unlikely_of
from gvpo_offline.report.settings import ReportSettings
from gvpo_offline.store.reference_selection import ReferenceSelection
from gvpo_offline.store.writer import publish
from gvpo_offline.stream.plan import CostModel, n_pieces, pack, shape_of
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.view import DatasetView

TOLERANCE = 1e-12  # of means of some hundred float64 numbers of size 1


def collected(root: Path, groups: list[Group] | None = None, **settings: Any) -> Collected:
    if groups is not None:
        build_dataset(root, groups=groups)
    chosen = ReportSettings(dataset=str(root), show_progress=False, **settings)
    return collect(open_for_report(chosen), chosen)


def counted(group: Group, number: int) -> np.ndarray[Any, Any]:
    if group.loss_mask is None:
        return np.ones(len(group.response_token_ids[number]), bool)
    return group.loss_mask[number]


# ---- the reference ----


def test_log_probs_by_sampler_and_position_are_those_of_plain_loops(tmp_path: Path) -> None:
    groups = make_groups(40)
    found = collected(tmp_path, groups).facts.reference
    assert found is not None
    per_token: dict[str, list[float]] = {}
    first: dict[str, list[float]] = {}
    last: dict[str, list[float]] = {}
    tokens: dict[tuple[str, int], list[float]] = {}
    for group in groups:
        assert group.ref_seq_logprobs is not None
        for i, row in enumerate(ref_token_logprobs(group)):
            name, mask = group.samplers[i], counted(group, i)
            per_token.setdefault(name, []).append(group.ref_seq_logprobs[i] / mask.sum())
            if mask[0]:
                first.setdefault(name, []).append(float(row[0]))
            if mask[-1] and not group.truncated[i]:
                last.setdefault(name, []).append(float(row[-1]))
            for position in np.flatnonzero(mask).tolist():
                bin_ = int(np.searchsorted(EDGES, position, side="right")) - 1
                tokens.setdefault((name, int(EDGES[bin_])), []).append(float(row[position]))
    assert {each.sampler for each in found.samplers} == set(per_token)
    for each in found.samplers:
        own = per_token[each.sampler]
        assert each.responses == len(own)
        assert each.per_token == pytest.approx(np.mean(own), abs=TOLERANCE)
        assert (each.low, each.median, each.high) == pytest.approx(
            tuple(np.quantile(own, (0.05, 0.5, 0.95))), abs=TOLERANCE
        )
        assert each.first == pytest.approx(np.mean(first[each.sampler]), abs=TOLERANCE)
        assert each.last == pytest.approx(np.mean(last[each.sampler]), abs=TOLERANCE)
    assert {(each.sampler, each.first) for each in found.positions} == set(tokens)
    for bin_ in found.positions:
        values = tokens[(bin_.sampler, bin_.first)]
        assert bin_.tokens == len(values)
        assert bin_.mean == pytest.approx(np.mean(values), abs=TOLERANCE)
    assert found.first is not None
    assert found.first.responses == sum(map(len, first.values()))
    assert found.unscored == 0
    assert (
        sum(count for _, _, count in found.histogram)
        == found.scored
        == sum(map(len, per_token.values()))
    )


def test_unlikely_responses_are_those_that_the_likely_metrics_give_less_weight() -> None:
    """`log_likely_weights` of the losses is below 0 exactly for them."""
    assert SLACK == likelihood.SLACK
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 7, 200)
    group = np.repeat(np.arange(200), sizes)
    lengths = rng.integers(1, 20, len(group)).astype(float)
    ref = -rng.exponential(1.5, len(group)) * lengths
    tensors = [torch.tensor(values) for values in (ref, ref, np.zeros(len(ref)), group)]
    terms = replace(GroupTerms.build(*tensors, beta=0.1), token_counts_N=torch.tensor(lengths))
    weights = likelihood.log_likely_weights(terms).numpy()
    found = unlikely_of(ref / lengths, group, 200)
    assert np.array_equal(found, weights < 0)
    assert 0 < found.sum() < len(found)


def test_responses_that_were_not_scored_are_not_part_of_a_median() -> None:
    """Of -1, -2, -9 and one not scored the median is -2: -9 is unlikely. Of -1 and -9 it is -1."""
    nan = math.nan
    values = np.array([-1.0, -2.0, -9.0, nan, -1.0, -9.0, nan, nan])
    group = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    found = unlikely_of(values, group, 3)
    assert found.tolist() == [False, False, True, False, False, True, False, False]


def test_truncation_by_hand(tmp_path: Path) -> None:
    """One of four responses is cut, the best of its group: half of the groups."""
    groups = [
        make_group(0, k=2, rewards=np.array([1.0, 0.0]), truncated=(True, False)),
        make_group(1, k=2, rewards=np.array([0.0, 0.5]), truncated=(False, False)),
    ]
    found = collected(tmp_path, groups).facts.truncation
    assert found is not None
    assert (found.responses, found.share, found.groups) == (1, 0.25, 1)
    assert (found.mean_reward, found.best) == (1.0, 0.5)
    assert found.mean_reward_of_others == pytest.approx(0.5 / 3, abs=TOLERANCE)


def test_a_reference_of_a_selection_leaves_the_others_out(tmp_path: Path) -> None:
    groups = [make_group(i, k=3) for i in range(6)]
    groups = [
        replace(g, ref_seq_logprobs=np.array([-3.0, np.nan, -6.0]))  # the second is not scored
        for g in groups
    ]
    newest = build_dataset(tmp_path, groups=[make_group(i, k=3) for i in range(6)]).manifest
    sidecars = [reference_sidecar(tmp_path, newest.groups[0], groups, folder="reference/part")]
    family = reference_family(sidecars, "part", selection=ReferenceSelection(where="TRUE"))
    changes = {"version": newest.version + 1, "references": [family]}
    publish(tmp_path, lambda _: newest.model_copy(update=changes))
    found = collected(tmp_path).facts.reference
    assert found is not None
    assert (found.scored, found.unscored) == (12, 6)
    expected = [
        value / counted(group, number).sum()
        for group in groups
        for number, value in ((0, -3.0), (2, -6.0))
    ]
    assert found.per_token == pytest.approx(np.mean(expected), abs=TOLERANCE)


# ---- duplicates ----


def ids(*numbers: int) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.int32)


def with_texts(number: int, prompt: list[int], *responses: list[int], **fields: Any) -> Group:
    """A group of given token ids."""
    k = len(responses)
    return make_group(
        number,
        k=k,
        prompt_token_ids=ids(*prompt),
        response_token_ids=tuple(ids(*each) for each in responses),
        ref_seq_logprobs=np.full(k, -1.0),
        **{
            "rewards": np.arange(k) / k,
            "truncated": (False,) * k,
            "samplers": ("a",) * k,
            **fields,
        },
    )


def test_exact_duplicates_by_hand(tmp_path: Path) -> None:
    """Group 0 repeats [7] twice with other rewards. Group 1 has one text only, of one reward.
    Groups 2 and 3 share prompt and responses, in another order. [7] stands under three prompts."""
    groups = [
        with_texts(0, [1], [7], [7], [7], [8]),
        with_texts(1, [2], [7], [7], rewards=np.array([0.5, 0.5])),
        with_texts(2, [3], [7], [9, 9]),
        with_texts(3, [3], [9, 9], [7]),
    ]
    found = collected(tmp_path, groups).facts.duplicates
    assert found is not None
    assert (found.prompts, found.groups_sharing, found.most_groups) == (3, 2, 2)
    assert (found.repeated, found.groups_repeating, found.groups_of_one) == (3, 2, 1)
    assert found.repeated_other_rewards == 1
    assert (found.across, found.across_texts, found.most_across) == (7, 1, 3)
    assert found.groups_twice == 1


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=6))
def test_repeats_are_counted_as_sets_count_them(texts: list[list[int]]) -> None:
    from gvpo_offline.report.dataset.duplicates import repeats_in_group

    keys = np.array(list(itertools.chain(*texts)), np.uint64)
    group = np.repeat(np.arange(len(texts)), list(map(len, texts)))
    found = repeats_in_group(keys, group)
    assert found.sum() == sum(len(row) - len(set(row)) for row in texts)


def test_prompts_that_stand_in_held_out_data_are_counted(tmp_path: Path) -> None:
    groups = [with_texts(n, [1, n // 2], [5], [6]) for n in range(6)]  # prompts 0, 1, 2, twice each
    other = [with_texts(n, [1, n], [7], [8]) for n in range(2, 6)]  # prompts 2, 3, 4, 5
    build_dataset(tmp_path / "held", groups=other)
    found = collected(tmp_path / "data", groups, held_out=str(tmp_path / "held")).facts.held_out
    assert found is not None
    assert (found.prompts, found.common, found.groups) == (4, 1, 2)
    assert found.same_tokenizer is None  # neither names one


# ---- near-duplicates ----


def sets(ids_: np.ndarray[Any, Any]) -> set[tuple[int, ...]]:
    return {tuple(ids_[i : i + 3].tolist()) for i in range(len(ids_) - 2)}


def sampled(number: int, prompt: Any, *responses: Any) -> SampledGroup:
    return SampledGroup((0, number), f"group-{number}", np.asarray(prompt, np.int32), responses)


def test_near_duplicates_are_found_within_groups_and_across_prompts() -> None:
    """A text of 60 ids and one of which the last id differs share 57 of 59 runs of three: the index
    is 57 / 59. Where 10 ids in its middle differ, 46 of 70 are shared, less than 0.8."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 1000, 60, dtype=np.int32)
    near, far = text.copy(), text.copy()
    near[-1] = 1001
    far[25:35] = rng.integers(2000, 3000, 10)
    assert len(sets(text) & sets(near)) / len(sets(text) | sets(near)) == 57 / 59
    assert len(sets(text) & sets(far)) / len(sets(text) | sets(far)) < 0.8
    others = [rng.integers(0, 1000, 60, dtype=np.int32) for _ in range(9)]
    found = near_facts(
        [
            sampled(0, rng.integers(0, 9, 20), text, near, far, others[0]),
            sampled(1, rng.integers(0, 9, 20), others[1], others[2]),
            sampled(2, rng.integers(0, 9, 20), others[3], text[:-1]),  # near both of group 0
            sampled(3, rng.integers(0, 9, 20), others[4], others[4]),  # equal, so not near
        ]
    )
    assert (found.groups, found.responses) == (4, 9)
    assert (found.in_group, found.groups_with, found.keys) == (2, 1, frozenset({(0, 0)}))
    assert found.across == 3
    assert found.near_prompts == 0


def test_what_all_prompts_share_does_not_make_them_near_duplicates() -> None:
    """A system prompt of 200 ids before questions of 12: alone by it, every pair has an index above
    0.8. Two questions differ in their last id."""
    rng = np.random.default_rng(1)
    system = rng.integers(0, 1000, 200)
    questions = [rng.integers(0, 1000, 30) for _ in range(30)]
    questions[7] = questions[3].copy()
    questions[7][-1] = 5000
    groups = [
        sampled(n, np.concatenate([system, question]), *rng.integers(0, 9, (2, 4), dtype=np.int32))
        for n, question in enumerate(questions)
    ]
    found = near_facts(groups)
    assert found.near_prompts == 2
    assert found.prompt_keys == {(0, 3), (0, 7)}
    assert found.examples == [("group-3", "group-7")]


def test_runs_are_sets_of_three_neighbours() -> None:
    assert len(runs_of(ids(1, 2, 3, 4))) == 2
    assert len(runs_of(ids(1, 1, 1, 1))) == 1
    assert len(runs_of(ids(5))) == 1
    assert runs_of(ids(5)) != runs_of(ids(5, 5))


def test_without_the_package_the_facts_say_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = near_facts([sampled(0, [1, 2], ids(1), ids(2))])
    assert found.missing == "pip install 'gvpo_offline[report]'"
    assert (found.groups, found.responses) == (1, 2)


# ---- cost ----


def test_tokens_by_layout_are_those_of_the_plan(tmp_path: Path) -> None:
    groups = make_groups(40)
    found = collected(tmp_path, groups, groups_per_step=8, num_train_epochs=1.5).facts.cost
    assert found is not None
    shapes = [shape_of(group) for group in groups]
    for layout in LAYOUTS:
        assert found.layout_tokens[layout] == sum(shape.tokens(layout) for shape in shapes)
    assert found.attended == sum(shape.attended for shape in shapes)
    assert found.scored == sum(1 + sum(shape.responses) - shape.rows for shape in shapes)
    assert found.longest_row == max(shape.prompt + max(shape.responses) for shape in shapes)
    assert found.largest_group == max(group.n_tokens for group in groups)
    assert (found.steps, found.steps_per_epoch) == (8, 5.0)  # 60 groups in steps of 8
    assert (found.training_groups, found.held_out_groups, found.too_long) == (40, 0, 0)
    assert found.passes_per_step == dict.fromkeys(LAYOUTS, 1.0)  # all fits into one


def test_forward_passes_are_those_of_steps_of_random_groups(tmp_path: Path) -> None:
    """With all groups in one step there is one step: the mean is its number of passes."""
    groups = make_groups(20)
    found = collected(
        tmp_path, groups, groups_per_step=20, max_tokens_per_micro_batch=40
    ).facts.cost
    assert found is not None
    shapes = [shape_of(group) for group in groups]
    for layout in LAYOUTS:
        model = CostModel(layout, 40)
        expected = sum(n_pieces(shapes, members, model) for members in pack(shapes, model))
        # Packing depends on the order of groups of one size alone, by at most their number.
        assert abs(found.passes_per_step[layout] - expected) <= 1


def test_held_out_groups_are_those_that_train_holds_out(tmp_path: Path) -> None:
    groups = make_groups(40)
    dataset = build_dataset(tmp_path, groups=groups)
    found = collected(tmp_path, eval_fraction=0.25).facts.cost
    assert found is not None
    view = DatasetView(dataset, select(dataset, eval_fraction=0.25))
    assert found.training_groups == view.n_groups
    assert found.held_out_groups == 40 - view.n_groups > 0


def test_responses_that_no_micro_batch_can_hold_are_counted(tmp_path: Path) -> None:
    """A row has prompt + response - 1 input tokens: 4 + 8 - 1 = 11 fits into 11, not into 10."""
    groups = [make_group(i, k=2, prompt_tokens=4, response_tokens=8) for i in range(3)]
    build_dataset(tmp_path, groups=groups)
    fits = collected(tmp_path, max_tokens_per_micro_batch=11).facts.cost
    stops = collected(tmp_path, max_tokens_per_micro_batch=10).facts.cost
    assert fits is not None
    assert stops is not None
    assert (fits.too_long, stops.too_long) == (0, 6)
    assert all(map(math.isnan, stops.passes_per_step.values()))


# ---- the estimate, whose parts tests/plan has by hand ----


def _model(**changes: object) -> ModelShape:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
    return shape_of_config({**config, **changes})


def test_the_memory_is_that_of_a_plan_for_the_largest_micro_batch(tmp_path: Path) -> None:
    settings = ReportSettings(
        dataset="x",
        model_name_or_path="m",
        bf16=True,
        activation_checkpointing=True,
        max_tokens_per_micro_batch=8192,
    )
    cost = collected(tmp_path, make_groups(4)).facts.cost
    assert cost is not None
    found = estimated(settings, replace(cost, largest_group=9000), _model())
    assert found.tokens == 8192
    scored = round(8192 * cost.scored / cost.layout_tokens["shared"])
    how = TrainingShape(autocast=True, checkpointing=True)
    planned = step_bytes(_model(), how, tokens=8192, scored=scored)
    assert found.total_gb == pytest.approx(planned.total / 1e9)
    assert set(found.memory_gb) == set(planned.parts)


def test_the_operations_by_hand() -> None:
    """2 per weight and token, three times with the backward pass; the head; attention; the logits
    are kept, so that nothing is computed again."""
    from gvpo_offline.report.dataset.cost import CostFacts

    cost = CostFacts(
        layout_tokens={"shared": 100, "padded": 200},
        training_groups=1,
        held_out_groups=0,
        steps=1,
        steps_per_epoch=1.0,
        passes_per_step={},
        longest_row=50,
        largest_group=100,
        too_long=0,
        prompt_quantiles=(),
        response_quantiles=(),
        attended=1000.0,
        scored=60.0,
    )
    shape = _model()
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    settings = ReportSettings(dataset="x", num_train_epochs=2, device_tflops=1e-6)
    products, head, attention = 2 * matrices * 100, 2 * 64 * 128 * 60, 4 * 64 * 2 * 1000
    found = estimated(settings, cost, shape)
    assert found.operations == 2 * 3 * (products + head + attention)
    assert found.hours == found.operations / 1e6 / 3600
    frozen = estimated(replace(settings, use_peft=True), cost, shape)
    assert frozen.operations == 2 * (2 * (products + head) + 3 * attention)
    again = estimated(replace(settings, activation_checkpointing=True), cost, shape)
    assert again.operations == found.operations + 2 * (products + attention)


def test_the_shape_of_a_model_is_read_from_its_configuration(tiny_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = model_shape(str(tiny_model_dir))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    assert found.vocabulary == model.get_input_embeddings().weight.shape[0]
    assert len(found.layers) == model.config.num_hidden_layers
    assert found.layers[0].mlp == model.config.intermediate_size
    assert found.tied == model.config.tie_word_embeddings
