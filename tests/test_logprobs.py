"""Log-probs of responses, against one response at a time without padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import make_group
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from torch import Tensor, nn

from gvpo_offline.compute import logprobs as logprobs_module
from gvpo_offline.compute.batch import make_micro_batch
from gvpo_offline.compute.logprobs import (
    keeps_logits,
    seq_logprobs,
    sum_logprobs,
    token_logprobs,
)
from gvpo_offline.compute.model import (
    autocast,
    autocast_dtype,
    disable_dropout,
    dtype_name,
    load_model,
    weights_sha256,
    with_adapter,
)
from gvpo_offline.config import ModelSettings
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.schema import Group

GROUPS = [make_group(i, masked=i == 2, vocab_size=VOCAB_SIZE) for i in range(5)]
CPU = torch.device("cpu")
WITH_DROPOUT = ("llama", "gpt2", "gpt-neox", "falcon", "opt")


def alone(model: nn.Module, group: Group, number: int) -> Tensor:
    """log pi of each token of one response: (T,) float64, from logits of the bare sequence."""
    prompt, response = group.prompt_token_ids, group.response_token_ids[number]
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    before = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return before[torch.arange(len(response)), ids[len(prompt) :]]


def expected_sums(model: nn.Module, groups: list[Group]) -> Tensor:
    """Sums over the tokens that count, response by response: (R,) float64."""
    sums = []
    for group in groups:
        for number in range(group.group_size):
            tokens = alone(model, group, number)
            mask = slice(None) if group.loss_mask is None else group.loss_mask[number]
            sums.append(tokens[mask].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_one_response_at_a_time(family: str) -> None:
    model, batch = tiny_model(family), make_micro_batch(GROUPS)
    with torch.no_grad():
        tokens = token_logprobs(model, batch)
    assert tokens.dtype == torch.float32
    where = batch.response_mask[:, batch.first_target :]
    row = 0
    for group in GROUPS:
        for number in range(group.group_size):
            expected = alone(model, group, number)
            torch.testing.assert_close(
                tokens[row][where[row]].double(), expected, atol=1e-4, rtol=0
            )
            row += 1
    assert row == len(tokens)
    sums = sum_logprobs(tokens, batch)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, expected_sums(model, GROUPS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "granite", "gpt2"])
def test_logits_that_are_left_out_change_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of at least 6 tokens, so that there is something to leave out."""
    groups = [make_group(i, prompt_tokens=6 + i, vocab_size=VOCAB_SIZE) for i in range(3)]
    model, batch = tiny_model(family), make_micro_batch(groups)
    assert keeps_logits(model)
    assert batch.first_target == 6
    widths = []

    def forward(**inputs: Tensor) -> object:
        output = model(**inputs)
        widths.append(output.logits.shape[1])
        return output

    wrapped = Forward(model, forward)
    with torch.no_grad():
        narrow = seq_logprobs(wrapped, batch)
        monkeypatch.setattr(logprobs_module, "keeps_logits", lambda model: False)
        full = seq_logprobs(wrapped, batch)
    length = batch.input_ids.shape[1]
    assert widths == [length - 6 + 1, length]
    torch.testing.assert_close(narrow, full, atol=1e-5, rtol=0)


class Forward(nn.Module):
    """A wrapper in the way of DDP's: the model is its `module`."""

    def __init__(self, module: nn.Module, forward: object) -> None:
        super().__init__()
        self.module = module
        self._call = forward

    def forward(self, **inputs: Tensor) -> object:
        return self._call(**inputs)  # type: ignore[operator]


def test_wrappers_do_not_hide_that_logits_can_be_left_out() -> None:
    from peft import LoraConfig

    model = tiny_model("qwen3")
    assert keeps_logits(Forward(model, model))
    assert keeps_logits(torch.compile(model))  # type: ignore[arg-type]
    assert keeps_logits(with_adapter(model, LoraConfig(r=2), seed=0))
    assert not keeps_logits(nn.Linear(2, 2))


def test_company_in_the_micro_batch_changes_nothing() -> None:
    """Padding, order and neighbours are no part of a response's log-prob."""
    model = tiny_model("qwen3")
    with torch.no_grad():
        together = seq_logprobs(model, make_micro_batch(GROUPS))
        apart = torch.cat([seq_logprobs(model, make_micro_batch([group])) for group in GROUPS])
        long_group = make_group(9, prompt_tokens=20, response_tokens=30, vocab_size=VOCAB_SIZE)
        beside = seq_logprobs(model, make_micro_batch([long_group, *GROUPS]))
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    torch.testing.assert_close(beside[long_group.group_size :], together, atol=1e-5, rtol=0)


def test_masked_tokens_are_read_but_not_counted() -> None:
    """All but the last token of each response masked: the sum is the last token's log-prob."""
    model, group = tiny_model("llama"), GROUPS[1]
    masks = tuple(np.arange(n) == n - 1 for n in group.response_lengths)
    with torch.no_grad():
        sums = seq_logprobs(model, make_micro_batch([replace(group, loss_mask=masks)]))
    last = torch.stack([alone(model, group, i)[-1] for i in range(group.group_size)])
    torch.testing.assert_close(sums, last, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_bfloat16_is_near(family: str) -> None:
    """Half of the 16 bits are gone: a token's log-prob moves by hundredths of a nat. The result is
    float32 nevertheless, of a float32 log-softmax.
    """
    model, batch = tiny_model(family), make_micro_batch(GROUPS)
    with torch.no_grad():
        exact = seq_logprobs(model, batch)
        with autocast(CPU, torch.bfloat16):
            cast = token_logprobs(model, batch)
        low = seq_logprobs(model.to(torch.bfloat16), batch)
    assert cast.dtype == torch.float32
    lengths = torch.tensor([n for group in GROUPS for n in group.response_lengths])
    for rough in (sum_logprobs(cast, batch), low):
        difference = (rough - exact).abs()
        assert difference.max() > 0
        assert (difference <= 0.06 * lengths).all()


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "eager") for family in FAMILIES), *((family, "sdpa") for family in WITH_DROPOUT)],
)
def test_dropout_is_off_wherever_it_hides(family: str, attention: str) -> None:
    """In training mode, as the trainer runs it: in modules, as numbers of attention layers, in the
    configuration, as layers left out.
    """
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    batch = make_micro_batch(GROUPS)

    def difference() -> float:
        with torch.no_grad():
            model.eval()
            still = seq_logprobs(model, batch)
            model.train()
            return max(float((seq_logprobs(model, batch) - still).abs().max()) for _ in range(3))

    assert (difference() > 0.01) == (family in WITH_DROPOUT)
    disable_dropout(model)
    assert difference() == 0.0


def test_dropout_of_an_adapter_is_off_too() -> None:
    from peft import LoraConfig

    settings = LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False)
    model, batch = with_adapter(tiny_model("qwen3"), settings, seed=0), make_micro_batch(GROUPS)
    model.train()
    with torch.no_grad():
        assert not torch.equal(seq_logprobs(model, batch), seq_logprobs(model, batch))
        disable_dropout(model)
        trained = seq_logprobs(model, batch)
        assert torch.equal(trained, seq_logprobs(model, batch))
        assert torch.equal(trained, seq_logprobs(model.eval(), batch))


def test_an_adapters_first_weights_depend_on_the_seed_alone() -> None:
    from peft import LoraConfig

    def weights(seed: int) -> str:
        return weights_sha256(with_adapter(tiny_model("qwen3"), LoraConfig(r=4), seed=seed))

    one = weights(1)
    torch.rand(3)
    assert weights(1) == one
    assert weights(2) != one


def test_the_layout_of_a_micro_batch() -> None:
    """Two groups by hand: prompts (5), (6, 7); responses (1, 2), (3) and (4, 8), (9)."""
    one = make_group(0, k=2, prompt_token_ids=np.array([5]), rewards=np.array([1.0, 0.0]))
    two = make_group(1, k=2, prompt_token_ids=np.array([6, 7]), rewards=np.array([0.5, 2.0]))
    one = replace(one, response_token_ids=(np.array([1, 2]), np.array([3])))
    mask = (np.array([False, True]), np.array([True]))
    two = replace(two, response_token_ids=(np.array([4, 8]), np.array([9])), loss_mask=mask)
    batch = make_micro_batch([one, two])
    assert batch.input_ids.tolist() == [[5, 1, 2, 0], [5, 3, 0, 0], [6, 7, 4, 8], [6, 7, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.response_mask.int().tolist() == [
        [0, 1, 1, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 0],
    ]
    assert batch.loss_mask[2].int().tolist() == [0, 0, 0, 1]
    assert batch.loss_mask[[0, 1, 3]].equal(batch.response_mask[[0, 1, 3]])
    assert batch.group_index.tolist() == [0, 0, 1, 1]
    assert batch.rewards.tolist() == [1.0, 0.0, 0.5, 2.0]
    assert batch.rewards.dtype == batch.ref_seq_logprobs.dtype == torch.float64
    assert (batch.first_target, batch.n_groups) == (1, 2)


def test_the_empty_micro_batch_touches_every_weight_and_moves_none() -> None:
    model, batch = tiny_model("qwen3"), make_micro_batch([])
    (seq_logprobs(model, batch).sum() * 0.0).backward()
    assert batch.n_groups == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_groups_of_which_some_lack_a_reference_are_refused() -> None:
    without = make_group(4, scored=False)
    with pytest.raises(DataError, match=r"group 'group-00004': every group has ref_seq_logprobs"):
        make_micro_batch([GROUPS[0], without])
    assert make_micro_batch([without]).ref_seq_logprobs.shape == (0,)


def test_weights_are_named_by_their_values() -> None:
    """One checkpoint, one hash, in whatever wider data type; another value, another hash."""
    model = tiny_model("qwen3").to(torch.bfloat16)
    one = weights_sha256(model)
    assert weights_sha256(model.float()) == one
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0
    assert weights_sha256(model) != one


def test_frozen_weights_alone_are_named_on_request() -> None:
    """Tied weights, which go by two names, count as trained under both."""
    model = tiny_model("qwen3")
    model.tie_weights()
    everything = weights_sha256(model, frozen_only=True)
    frozen = dict(model.named_parameters())["model.norm.weight"]
    frozen.requires_grad_(False)
    one = weights_sha256(model, frozen_only=True)
    assert one != everything
    with torch.no_grad():
        model.get_input_embeddings().weight += 1.0
        assert weights_sha256(model, frozen_only=True) == one
        frozen += 1.0
        assert weights_sha256(model, frozen_only=True) != one


def test_a_model_that_cannot_be_loaded(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*Correct model_name_or_path"):
        load_model(ModelSettings(model_name_or_path=str(tmp_path / "nowhere")))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_model_dir.iterdir():
        content = path.read_bytes()
        cut = len(content) // 2 if path.suffix == ".safetensors" else len(content)
        (broken / path.name).write_bytes(content[:cut])
    with pytest.raises(ConfigError, match=r"broken.*Correct model_name_or_path"):
        load_model(ModelSettings(model_name_or_path=str(broken)))


def test_data_types_by_name() -> None:
    assert dtype_name(autocast_dtype(bf16=True, fp16=False)) == "bfloat16"
    assert dtype_name(autocast_dtype(bf16=False, fp16=True)) == "float16"
    assert autocast_dtype(bf16=False, fp16=False) is None
    with pytest.raises(ConfigError, match="exclude each other"):
        autocast_dtype(bf16=True, fp16=True)
