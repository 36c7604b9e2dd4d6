"""Which way of computing log-probs the start-up probe takes for a model, and what it refuses."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support.hybrid_models import CONTINUED, FORGETFUL, REFUSED, hybrid_model
from support.oracle import group_of, measured_alone, measured_by
from support.rounding import LOGPROB_ROUNDING, ROUNDING
from support.tiny_models import ALIBI, FAMILIES, OTHER_ATTENTION, tiny_model
from torch import Tensor, nn

from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.model import attention_of, disable_dropout
from gvpo_offline.compute.probe import Choice, choose_path, engine_for, prepare_engine
from gvpo_offline.compute.settings import ComputePath, LayoutName
from gvpo_offline.errors import ConfigError
from gvpo_offline.stream.plan import CostModel

# falcon makes its masks itself; the logits of llama4 come from no decoder that it names.
SHARED = [name for name in (*FAMILIES, *OTHER_ATTENTION) if name not in ("falcon", "llama4")]
GROUP = group_of([5, 6, 7, 8, 9], [[11, 12, 13, 14], [11, 12, 13, 15, 16], [17], [11, 12, 13, 14]])


def model_of(family: str) -> Any:
    known = CONTINUED | FORGETFUL | REFUSED
    model = (hybrid_model if family in known else tiny_model)(family)
    disable_dropout(model)
    return model.train()


@pytest.mark.parametrize("family", SHARED)
def test_attention_is_shared(family: str) -> None:
    choice = choose_path(model_of(family))
    # Attention scores that are soft-capped are no kernel's but the dense one's, here.
    attention = "dense" if family == "gemma2" else "pieces"
    assert choice.path == ComputePath("shared", attention, "fused")
    assert choice.prompt_once
    assert choice.error <= LOGPROB_ROUNDING
    assert [reason.split(":")[0] for reason in choice.refused] == (
        ["shared layout, pieces attention, fused head"] if family == "gemma2" else []
    )


@pytest.mark.parametrize("family", [*CONTINUED, *ALIBI, "falcon"])
def test_states_and_biased_scores_are_continued(family: str) -> None:
    choice = choose_path(model_of(family))
    assert choice.path.layout == "continued"
    assert choice.path.head == "fused"
    assert not choice.prompt_once
    assert {reason.split()[0] for reason in choice.refused} == {"shared"}


@pytest.mark.parametrize("family", [*FORGETFUL, *REFUSED])
def test_what_nothing_else_gets_right_is_padded(family: str) -> None:
    choice = choose_path(model_of(family))
    assert choice.path.layout == "padded"
    # A reason for each that costs less.
    assert _layouts_in(choice) == ["shared", "continued", "packed"]


def _layouts_in(choice: Choice) -> list[str]:
    return list(dict.fromkeys(reason.split()[0].rstrip(":") for reason in choice.refused))


def test_reasons_name_nats_or_what_is_missing() -> None:
    choice = choose_path(model_of("lfm2"))
    # Convolutions over neighbouring rows mix responses.
    assert "shared layout, pieces attention, fused head: off by 0." in choice.refused[0]
    assert "nats, gradients by" in choice.refused[0]
    described = choice.describe()
    assert described.startswith("continued layout, sdpa attention, fused head (agrees with")
    assert described.endswith(")")
    assert all(reason in described for reason in choice.refused)


def test_choice_and_reasons_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gvpo_offline"):
        engine = prepare_engine(model_of("gemma2"), max_tokens=100)
    assert engine.path.attention == "dense"
    assert "log-probs: shared layout, dense attention, fused head (agrees" in caplog.text
    assert "soft-capped" in caplog.text


# ---- heads ----


def test_a_head_of_its_own_is_computed_through_the_models_logits() -> None:
    model = model_of("qwen3")
    model.lm_head = nn.Sequential(model.lm_head, nn.Softplus())
    truth = measured_alone(model, [GROUP])
    choice = choose_path(model)
    assert choice.path == ComputePath("shared", "pieces", "logits")
    assert not choice.prompt_once
    # It comes first among the reasons, and is said.
    assert choice.refused[0].startswith("padded layout, sdpa attention, fused head: ")
    assert "nn.Linear" in choice.refused[0]
    for budget in (1000, 9):
        engine = engine_for(model, choice, max_tokens=budget)
        nats, relative = measured_by(engine, model, [GROUP]).errors(truth)
        assert nats <= LOGPROB_ROUNDING
        assert relative <= ROUNDING


def test_logits_that_a_forward_changes_at_the_end_are_noticed() -> None:
    # A head like any other, and a model that scales what comes from it.
    model = model_of("qwen3")
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = forward
    choice = choose_path(model)
    assert choice.path.head == "logits"
    assert "fused head: off by" in choice.refused[0]


# ---- forced ----


@pytest.mark.parametrize("layout", ["shared", "packed", "continued", "padded"])
def test_a_layout_that_is_asked_for_is_taken_if_it_is_right(layout: LayoutName) -> None:
    model = model_of("olmo3")
    truth = measured_alone(model, [GROUP])
    choice = choose_path(model, layout=layout)
    assert choice.path.layout == layout
    engine = engine_for(model, choice, max_tokens=1000)
    nats, relative = measured_by(engine, model, [GROUP]).errors(truth)
    assert nats <= LOGPROB_ROUNDING
    assert relative <= ROUNDING


@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen3.5", "shared"), ("qwen3.5", "packed"), ("mamba", "continued"), ("bloom", "packed")],
)
def test_a_layout_that_is_asked_for_is_refused_if_it_is_wrong(
    family: str, layout: LayoutName
) -> None:
    model = model_of(family)
    before = attention_of(model)
    with pytest.raises(ConfigError, match=r"one response at a time.*nats.*layout to auto or pad"):
        choose_path(model, layout=layout)
    assert attention_of(model) == before


# ---- models that lie ----


def test_attention_that_ignores_the_row_is_never_shared() -> None:
    # It looks attention up by name as others do, and loses the argument on the way.
    model = model_of("llama")
    for layer in model.model.layers:
        inner = layer.self_attn.forward

        def forward(*args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            kwargs.pop("packed_row", None)
            return _inner(*args, **kwargs)

        layer.self_attn.forward = forward
    choice = choose_path(model)
    assert choice.path.layout != "shared"
    assert any(reason.startswith("shared") for reason in choice.refused)
    with pytest.raises(ConfigError):
        choose_path(model, layout="shared")


def test_one_layer_of_many_that_ignores_the_row_is_enough() -> None:
    model = model_of("llama")
    inner = model.model.layers[1].self_attn.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("packed_row", None)
        return inner(*args, **kwargs)

    model.model.layers[1].self_attn.forward = forward
    assert choose_path(model).path.layout != "shared"


class _Blurred(nn.Module):
    """Adds to each row's input a little of the row before: harmless in a row of one sequence."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.inner(ids)
        before = nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        mixed: Tensor = embedded + self.share * before
        return mixed


@pytest.mark.parametrize("share", [0.5, 0.05])
def test_neighbouring_rows_that_are_mixed_are_noticed(share: float) -> None:
    model = model_of("llama")
    model.get_input_embeddings = lambda inner=model.model.embed_tokens: inner
    model.model.embed_tokens = _Blurred(model.model.embed_tokens, share)
    choice = choose_path(model)
    # Rows of a prompt and a response each have the right neighbours, and no others.
    assert choice.path.layout == "padded"
    assert _layouts_in(choice) == ["shared", "continued", "packed"]
    assert all("off by" in reason for reason in choice.refused)


def test_a_model_that_is_not_causal_is_refused_altogether() -> None:
    model = model_of("llama")
    inner = model.model.norm.forward
    model.model.norm.forward = lambda x: inner(x + x.mean(dim=1, keepdim=True))
    with pytest.raises(ConfigError, match="none of the layouts computes it right"):
        choose_path(model)


# ---- what it leaves behind ----


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss", "bloom", "qwen3.5"])
def test_the_model_is_what_it_was(family: str) -> None:
    model = model_of(family)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [9, 8, 7, 6, 0, 0, 0]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    generated = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        logits = model(**given).logits
        model.eval()
        text = model.generate(ids[:1], **generated)
        model.train()
    marked = next(model.parameters())
    marked.grad = torch.full_like(marked, 7.0)
    choose_path(model)
    assert model.training
    assert marked.grad.eq(7.0).all()
    assert all(p.grad is None for p in model.parameters() if p is not marked)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    with torch.no_grad():
        assert torch.equal(model(**given).logits, logits)
        assert torch.equal(model.eval().generate(ids[:1], **generated), text)


def test_a_model_may_be_probed_again() -> None:
    model = model_of("qwen3")
    first = choose_path(model)
    assert choose_path(model, layout="padded").path == ComputePath("padded", "sdpa", "fused")
    assert choose_path(model).path == first.path


def test_without_gradients_none_are_asked_for() -> None:
    model = model_of("qwen3").eval().requires_grad_(requires_grad=False)
    assert choose_path(model, gradients=False).path.layout == "shared"


def test_a_choice_is_an_engine() -> None:
    path = ComputePath("continued", "sdpa", "fused")
    choice = Choice(path, prompt_once=False, refused=(), error=0.0)
    engine = engine_for(model_of("qwen3"), choice, max_tokens=77, kept_bytes=5)
    # Width 32: attention on 6 x 32 keys costs as much as the rest of a token.
    cost = CostModel("continued", 77, 192)
    assert engine == Engine(path, cost, kept_bytes=5, prompt_once=False)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("family", [*CONTINUED, *FORGETFUL, *REFUSED, "bloom", "gemma2", "qwen3"])
def test_bfloat16_hides_no_wrong_layout(family: str, gradients: bool) -> None:
    # Half a nat is what bfloat16 may round by, and more than a short convolution across responses
    # does to short ones: the layout is judged in float32.
    truth = choose_path(model_of(family), gradients=gradients)
    model = model_of(family).bfloat16()
    weights = [parameter.data_ptr() for parameter in model.parameters()]
    choice = choose_path(model, gradients=gradients)
    assert choice.path.layout == truth.path.layout
    assert [parameter.data_ptr() for parameter in model.parameters()] == weights
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_rounding_that_flips_a_decision_leaves_a_right_layout() -> None:
    # What experts with almost equal scores do: in bfloat16 the same tokens, in padded rows, go
    # another way, and log-probs change by far more than rounding. In float32 they do not.
    model = model_of("llama").bfloat16()
    inner = model.model.norm.forward

    def forward(hidden: Tensor) -> Tensor:
        flips = hidden.dtype == torch.bfloat16 and len(hidden) > 1
        return inner(hidden) * (3.0 if flips else 1.0)

    model.model.norm.forward = forward
    assert choose_path(model).path.layout == "shared"
    # Padded rows are the model's own forward, and there is nothing left to take instead.
    assert choose_path(model, layout="padded").path.layout == "padded"


def test_a_kernel_that_is_wrong_in_bfloat16_only_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Proven in float32; in bfloat16 nothing that this model's rounding explains.
    right = Engine.accumulate

    def accumulate(self: Engine, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = right(self, model, *args, **kwargs)
        if model.dtype == torch.bfloat16 and self.path.layout == "shared":
            for parameter in model.parameters():
                parameter.grad = None if parameter.grad is None else 1.5 * parameter.grad
        return loss

    monkeypatch.setattr(Engine, "accumulate", accumulate)
    choice = choose_path(model_of("llama").bfloat16())
    assert choice.path.layout == "continued"
    assert any(reason.startswith("shared") and "50%" in reason for reason in choice.refused)
