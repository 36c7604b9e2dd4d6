"""A saved policy is served as it is: pipeline, vLLM, GGUF, adapters (docs/howto/serving.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import load, scored_dataset, trainer_of
from transformers import AutoTokenizer, GenerationConfig, pipeline

from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.tokenizer import load_tokenizer, tokenizer_info
from gvpo_offline.train.serving import make_portable, name_rotary_base, portable_tokenizer

QUESTION = [{"role": "user", "content": "What is 1 + 1?"}]
# Turns end with a token that is neither the model's nor the tokenizer's end token.
ENDS_TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|system|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("served") / "data", tiny_model_dir, 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A policy that was trained for one step with a template whose turns end with <|system|>."""
    folder = tmp_path_factory.mktemp("serving")
    base = Path(shutil.copytree(tiny_model_dir, folder / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = ENDS_TURNS
    tokenizer.save_pretrained(base)
    trainer = trainer_of(base, scored_dataset(folder / "data", base, 8), folder / "run")
    trainer.train()
    trainer.save_model()
    assert trainer.model.config.use_cache is False  # as the Trainer wants it during training
    assert "save_pretrained" not in vars(trainer.processing_class)
    return folder / "run"


def test_a_pipeline_answers_texts_and_chats(run: Path) -> None:
    served = pipeline("text-generation", model=str(run))
    assert served.model.dtype == torch.float32
    assert served.model.config.use_cache is True
    (text,) = served("What is 1 + 1?", max_new_tokens=4, do_sample=False)
    assert text["generated_text"].startswith("What is 1 + 1?")
    (chat,) = served(QUESTION, max_new_tokens=4, do_sample=False)
    assert [turn["role"] for turn in chat["generated_text"]] == ["user", "assistant"]


def test_generation_stops_at_the_end_of_a_turn(run: Path, tiny_model_dir: Path) -> None:
    """Token 5, <|system|>, ends a turn, token 2, <eos>, a text. Where the fifth token is likely,
    generation ends with it.
    """
    tokenizer = AutoTokenizer.from_pretrained(run)
    end = tokenizer.convert_tokens_to_ids("<|system|>")
    named = GenerationConfig.from_pretrained(run).eos_token_id
    assert named == [tokenizer.eos_token_id, end]
    before = GenerationConfig.from_pretrained(tiny_model_dir).eos_token_id
    assert before == tokenizer.eos_token_id
    model: Any = load(run)

    def only(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, end if ids.shape[1] == 4 else 7] = 0.0
        return chosen

    from transformers import LogitsProcessorList

    ids = torch.tensor([[1, 3]])
    out = model.generate(
        ids, max_new_tokens=9, do_sample=False, logits_processor=LogitsProcessorList([only])
    )
    assert out[0].tolist() == [1, 3, 7, 7, end]


def test_the_files_that_servers_read_are_there(run: Path, tiny_model_dir: Path) -> None:
    """vLLM and llama.cpp's converter read these; no other file of weights is beside them."""
    names = {path.name for path in run.iterdir()}
    assert {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "chat_template.jinja"),
    } <= names
    assert not [name for name in names if name.endswith((".bin", ".pt")) and "args" not in name]
    config = json.loads((run / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "float32"
    assert config.get("use_cache", True) is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    held = json.loads((run / "tokenizer_config.json").read_text())
    assert held["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows
    assert not {"is_local", "local_files_only"} & set(held)
    assert (run / "chat_template.jinja").read_text() == ENDS_TURNS
    own, base = load_tokenizer(str(run)), load_tokenizer(str(tiny_model_dir))
    assert own("What is 1 + 1?")["input_ids"] == base("What is 1 + 1?")["input_ids"]


def test_a_mended_tokenizer_is_the_same_tokenizer(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The fingerprint that datasets record, with further special tokens too."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<tool>"]})
    tokenizer.save_pretrained(tmp_path / "plain")
    with portable_tokenizer(tokenizer):
        tokenizer.save_pretrained(tmp_path / "mended")
    plain, mended = (AutoTokenizer.from_pretrained(tmp_path / n) for n in ("plain", "mended"))
    assert tokenizer_info(mended).fingerprint == tokenizer_info(plain).fingerprint
    text = "<|user|>hello <tool>"
    assert mended(text)["input_ids"] == plain(text)["input_ids"]
    assert mended.decode(mended(text)["input_ids"], skip_special_tokens=True) == plain.decode(
        plain(text)["input_ids"], skip_special_tokens=True
    )
    held = json.loads((tmp_path / "mended" / "tokenizer_config.json").read_text())
    assert held["additional_special_tokens"] == ["<|user|>", "<tool>"]
    assert "extra_special_tokens" not in held


def test_other_classes_of_tokenizers_are_left_as_they_are(tmp_path: Path) -> None:
    text = json.dumps({"tokenizer_class": "LlamaTokenizer", "x": "ä"})
    (tmp_path / "tokenizer_config.json").write_text(text)
    make_portable(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_text() == text
    shutil.rmtree(tmp_path)
    make_portable(tmp_path)  # a folder without a tokenizer


ROPE = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


@pytest.mark.parametrize("kind", ROPE)
def test_the_rotary_base_has_its_earlier_name_too(tmp_path: Path, kind: str) -> None:
    """transformers 4 reads rope_theta and rope_scaling, transformers 5 the same as without them."""
    from transformers import AutoConfig, LlamaConfig

    made = LlamaConfig(rope_parameters=dict(ROPE[kind]), max_position_embeddings=8192)
    made.save_pretrained(tmp_path)
    name_rotary_base(tmp_path)
    held = json.loads((tmp_path / "config.json").read_text())
    assert held["rope_theta"] == ROPE[kind]["rope_theta"]
    scaled = {name: value for name, value in ROPE[kind].items() if name != "rope_theta"}
    assert held.get("rope_scaling") == (scaled if kind == "llama3" else None)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == made.rope_parameters


def test_layers_with_different_rotary_settings_are_left_as_they_are(tmp_path: Path) -> None:
    own = {"full_attention": ROPE["default"], "sliding_attention": ROPE["default"]}
    text = json.dumps({"rope_parameters": own})
    (tmp_path / "config.json").write_text(text)
    name_rotary_base(tmp_path)
    assert (tmp_path / "config.json").read_text() == text


def test_an_adapter_is_served_as_it_is_and_merged(
    tmp_path: Path, dataset: GroupDataset, tiny_model_dir: Path
) -> None:
    """As docs/howto/serving.md has it: the merged folder gives the adapter's logits."""
    from peft import AutoPeftModelForCausalLM, LoraConfig

    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path / "run", peft_config=settings)
    trainer.train()
    trainer.save_model()
    served = pipeline("text-generation", model=str(tmp_path / "run"))
    (chat,) = served(QUESTION, max_new_tokens=4, do_sample=False)
    assert chat["generated_text"][-1]["role"] == "assistant"
    adapted: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.tensor([[1, 3, 40, 41]])
    with torch.no_grad():
        expected = adapted(ids).logits
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        found = load(tmp_path / "merged")(ids).logits
    # W x + B A x and (W + B A) x: 32 products, each rounded twice.
    assert (found - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * max(
        1.0, float(expected.abs().max())
    )
