"""Samplers whose model is a PEFT adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support.importing import read_groups
from support.sampling import config, local
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_offline.errors import ConfigError
from gvpo_offline.sampling.run import _Run, run_sample
from gvpo_offline.sampling.settings import sampler_settings
from gvpo_offline.sampling.vllm import VllmSampler
from gvpo_offline.store.manifest import load_manifest


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """An adapter of rank 2, away from zero, with the tokenizer, as a run leaves it."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]
    )
    model = get_peft_model(base, settings)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.5, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


def test_it_draws_from_the_base_with_the_adapter(
    tmp_path: Path, tiny_model_dir: Path, adapter_dir: Path
) -> None:
    """Log-probs are those of base and adapter together, by PEFT's forward over the whole text.

    The tolerance is that of test_sampler_logprobs for 12 tokens.
    """
    from peft import PeftModel

    samplers = {"a": local(adapter_dir, dtype="float32"), "b": local(tiny_model_dir, responses=1)}
    run_sample(config(tmp_path, tiny_model_dir, samplers, n=2))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = PeftModel.from_pretrained(base, adapter_dir).eval()
    far = []
    for group in read_groups(tmp_path / "data"):
        assert group.sampler_seq_logprobs is not None
        for ids, logprob in zip(
            group.response_token_ids[:3], group.sampler_seq_logprobs, strict=False
        ):
            text = torch.tensor([[*group.prompt_token_ids.tolist(), *ids.tolist()]])
            start = len(group.prompt_token_ids) - 1
            sums = []
            for disabled in (False, True):
                with torch.inference_mode():
                    if disabled:
                        with model.disable_adapter():
                            found = model(input_ids=text).logits[0].log_softmax(-1)
                    else:
                        found = model(input_ids=text).logits[0].log_softmax(-1)
                sums.append(sum(float(found[start + t, i]) for t, i in enumerate(ids)))
            assert logprob == pytest.approx(sums[0], abs=12e-4)
            far.append(abs(sums[0] - sums[1]))
    # One response may be as likely under both; all six together are not.
    assert max(far) > 8 * 12e-4
    recorded = load_manifest(tmp_path / "data").samplers
    assert recorded["a"]["model"] == recorded["b"]["model"]
    assert "adapter" in recorded["a"]
    assert "adapter" not in recorded["b"]


def test_its_weights_and_its_base_are_in_the_identity(
    tmp_path: Path, tiny_model_dir: Path, adapter_dir: Path
) -> None:
    """Not the folders' paths."""

    def stage(folder: Path) -> str:
        run = config(tmp_path, tiny_model_dir, {"s": local(folder)}, n=2)
        return _Run(run, tmp_path / "data").stages["s"].name

    def copied(name: str, base: Path, **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(adapter_dir, folder)
        file = folder / "adapter_config.json"
        held = {**json.loads(file.read_text()), "base_model_name_or_path": str(base), **changes}
        file.write_text(json.dumps(held))
        return folder

    moved = tmp_path / "moved_base"
    shutil.copytree(tiny_model_dir, moved)
    own = stage(adapter_dir)
    assert stage(copied("same", moved)) == own
    other = tmp_path / "other_base"
    shutil.copytree(tiny_model_dir, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(other)
    changed = copied("changed", tiny_model_dir)
    weights = changed / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    names = [
        own,
        stage(tiny_model_dir),
        stage(copied("other", other)),
        stage(changed),
        stage(copied("scaled", tiny_model_dir, lora_alpha=8)),
    ]
    assert len(set(names)) == len(names)


def test_what_cannot_be_sampled_is_said(
    tmp_path: Path, tiny_model_dir: Path, adapter_dir: Path
) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            run_sample(config(tmp_path, tiny_model_dir, {"s": local(folder)}, n=2))
        return str(caught.value)

    learned = tmp_path / "learned"
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, settings).save_pretrained(learned)
    assert "PROMPT_TUNING" in refusal(learned)
    activated = tmp_path / "activated"
    shutil.copytree(adapter_dir, activated)
    file = activated / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alora_invocation_tokens": [5]}))
    assert "in the model's layers alone" in refusal(activated)
    lost = tmp_path / "lost"
    shutil.copytree(adapter_dir, lost)
    file = lost / "adapter_config.json"
    missing = {"base_model_name_or_path": str(tmp_path / "nowhere")}
    file.write_text(json.dumps({**json.loads(file.read_text()), **missing}))
    assert "nowhere" in refusal(lost)


def test_vllm_is_told_to_merge(tiny_model_dir: Path, adapter_dir: Path) -> None:
    values = {"kind": "vllm", "model_name_or_path": str(adapter_dir)}
    settings: Any = sampler_settings("s", values)
    tokenizer: Any = None
    with pytest.raises(ConfigError, match="merge_and_unload") as caught:
        VllmSampler(settings, tokenizer).info()
    assert str(tiny_model_dir) in str(caught.value)
