"""The number of positions of a model, and data that exceed it: refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import make_group
from support.training import longest_row, place_of, score, trainer_of, unscored_dataset
from transformers import (
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    RobertaConfig,
)

from gvpo_offline.commands.evaluate import run_evaluate
from gvpo_offline.commands.settings import EvaluateConfig
from gvpo_offline.compute.context import context_length
from gvpo_offline.errors import DataError
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.stream.settings import DatasetSettings
from gvpo_offline.tokenizer import known_context, load_tokenizer

LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
PHI: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0}


def rope(kind: str, factor: float, original: int | None = None) -> dict[str, Any]:
    settings: dict[str, Any] = {"rope_type": kind, "factor": factor, "rope_theta": 10_000.0}
    return (
        settings if original is None else {**settings, "original_max_position_embeddings": original}
    )


LLAMA3 = {**rope("llama3", 8.0, 8192), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[PreTrainedConfig, int | None]] = {
    "learned positions": (GPT2Config(n_positions=48), 48),
    "learned positions with an offset": (OPTConfig(max_position_embeddings=2048), 2048),
    # Positions start at the padding id + 1: a table of 514 rows has positions 2 … 513.
    "positions after the padding id": (
        RobertaConfig(max_position_embeddings=514, pad_token_id=1),
        512,
    ),
    "rotary positions": (LlamaConfig(max_position_embeddings=4096), 4096),
    # Published for `linear` and `dynamic`: the number of positions of pretraining, and the factor.
    "linear": (
        LlamaConfig(max_position_embeddings=2048, rope_parameters=rope("linear", 4.0)),
        4 * 2048,
    ),
    "dynamic": (
        LlamaConfig(max_position_embeddings=2048, rope_parameters=rope("dynamic", 2.0)),
        2 * 2048,
    ),
    # Qwen2.5: 32,768 positions, and with this setting 131,072.
    "yarn": (
        Qwen2Config(max_position_embeddings=32_768, rope_parameters=rope("yarn", 4.0, 32_768)),
        131_072,
    ),
    # The larger of both: 131,072 is already the extended number.
    "yarn, extended number of positions": (
        Qwen2Config(max_position_embeddings=131_072, rope_parameters=rope("yarn", 4.0, 32_768)),
        131_072,
    ),
    # Llama 3.1: 8 times 8,192 positions are fewer than its 131,072.
    "llama3": (LlamaConfig(max_position_embeddings=131_072, rope_parameters=LLAMA3), 131_072),
    # Phi-3: the extended number, and the original beside it; no factor.
    "longrope": (
        Phi3Config(
            max_position_embeddings=16_384,
            original_max_position_embeddings=4096,
            rope_parameters={"rope_type": "longrope", "rope_theta": 10_000.0, **LONG},
            **PHI,
        ),
        16_384,
    ),
    # Layers with a window have plain rotary positions, so the factor of the others adds nothing.
    "two kinds of layers": (
        Gemma3TextConfig(
            max_position_embeddings=131_072,
            rope_parameters={
                "full_attention": rope("linear", 8.0),
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        ),
        131_072,
    ),
    "ALiBi": (BloomConfig(), None),
    "ALiBi by a setting": (FalconConfig(alibi=True), None),
    "ALiBi in a part of the configuration": (MptConfig(), None),
    "no positions": (MambaConfig(), None),
}


@pytest.mark.parametrize(("config", "expected"), CASES.values(), ids=CASES)
def test_positions_of_a_configuration(config: PreTrainedConfig, expected: int | None) -> None:
    assert context_length(config) == expected


def test_a_model_without_configuration_has_no_known_limit() -> None:
    assert context_length(None) is None


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A GPT-2 with 48 positions, and the tokenizer of the tiny model."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 48}
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **special))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def groups_up_to(n_tokens: int) -> list[Any]:
    """Twelve groups with prompts of 4 tokens; the ninth has responses for `n_tokens` inputs."""
    # The last token of a response is not an input: 4 + (n_tokens - 3) - 1.
    lengths = [n_tokens - 3 if i == 8 else 9 for i in range(12)]
    return [
        make_group(i, scored=False, vocab_size=300, prompt_tokens=4, response_tokens=length)
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("n_tokens", [48, 49])
def test_all_commands_refuse_rows_beyond_the_positions(
    gpt2: Path, tmp_path: Path, n_tokens: int
) -> None:
    """48 inputs fit into 48 positions; 49 raised an IndexError inside the model."""
    root = unscored_dataset(tmp_path / "data", gpt2, groups=groups_up_to(n_tokens))
    unscored = open_dataset(root, join=())
    longest, place = longest_row(unscored)
    assert longest == n_tokens
    if n_tokens == 48:
        dataset = score(root, gpt2)
        trainer_of(gpt2, dataset, tmp_path / "run", max_steps=1).train()
        return
    with pytest.raises(DataError, match=r"48 positions.*49 tokens in ") as scoring:
        score(root, gpt2)
    # Scored by another program: the trainer and evaluate check for themselves.
    scored = unscored_dataset(
        tmp_path / "scored", gpt2, groups=[*groups_up_to(n_tokens)], reference=True
    )
    trainer = trainer_of(gpt2, scored, tmp_path / "run", reference_check="off")
    with pytest.raises(DataError) as training:
        trainer.train()
    config = EvaluateConfig(
        str(gpt2), dataset=str(scored), beta=1.0, use_cpu=True, show_progress=False
    )
    with pytest.raises(DataError) as evaluation:
        run_evaluate(config)
    assert place_of(scoring.value) == place
    # The remedy that the error names.
    assert "where: prompt_length + response_length_max <= 48" in str(training.value)
    short = DatasetSettings(str(scored), where="prompt_length + response_length_max <= 48")
    fits = trainer_of(gpt2, short, tmp_path / "short", reference_check="off")
    assert fits.preflight()[0].n_groups == 11
    for caught in (training, evaluation):
        assert place_of(caught.value)[1:] == place[1:]
        assert "48 positions" in str(caught.value)


def test_the_longest_of_several_datasets_is_named(gpt2: Path, tmp_path: Path) -> None:
    """50 and 60 inputs: the error is about the latter, though it comes second."""
    roots = [
        unscored_dataset(tmp_path / str(n), gpt2, groups=groups_up_to(n), reference=True)
        for n in (50, 60)
    ]
    trainer = trainer_of(
        gpt2, [str(root) for root in roots], tmp_path / "run", reference_check="off"
    )
    with pytest.raises(DataError, match=r"60 tokens in .*/60") as caught:
        trainer.train()
    assert place_of(caught.value)[0].startswith(str(roots[1]))  # type: ignore[union-attr]


def test_what_a_tokenizer_knows_of_its_model(
    gpt2: Path, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The configuration beside it, or else its own limit, unless that stands for none."""
    assert known_context(load_tokenizer(str(gpt2))) == 48
    alone = load_tokenizer(str(tiny_tokenizer_dir))
    assert alone.model_max_length > 1e20
    assert known_context(alone) is None
    alone.model_max_length = 2048
    alone.save_pretrained(tmp_path)
    assert known_context(load_tokenizer(str(tmp_path))) == 2048
    BloomConfig().save_pretrained(tmp_path)
    assert known_context(load_tokenizer(str(tmp_path))) is None
