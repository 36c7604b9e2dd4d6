"""Adapters: what a folder with one is, its base as reference, quantised bases."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support.fork_server import ForkServer
from support.rounding import ADAM_EPSILON, ROUNDING, adam_rounding
from support.tiny_models import tiny_model
from support.training import (
    config_of,
    copy_of,
    largest_difference,
    lines_of,
    load,
    same_weights,
    score,
    sidecars,
    unscored_dataset,
)
from torch import nn
from transformers import AutoTokenizer

from gvpo_offline.commands.evaluate import run_evaluate
from gvpo_offline.commands.settings import EvaluateConfig
from gvpo_offline.commands.train import run_train
from gvpo_offline.compute.adapters import (
    adapter_disabled,
    check_trainable,
    load_policy,
    policy_sha256,
    with_adapter,
)
from gvpo_offline.compute.model import weights_sha256
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError, IntegrityError
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.stream.settings import DatasetSettings, DataSettings
from gvpo_offline.train.settings import LoraSettings, RunSettings
from gvpo_offline.train.trainer import GVPOTrainer

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**changes: Any) -> LoraConfig:
    """An adapter of rank 2."""
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": TARGETS, **changes}
    )


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """The adapter, away from zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 30).view(3, 9)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


@pytest.fixture(scope="module")
def unscored(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """24 groups in 3 shards."""
    return unscored_dataset(tmp_path_factory.mktemp("unscored") / "data", tiny_model_dir)


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The folder of an adapter of the tiny model, as a run leaves it."""
    folder = tmp_path_factory.mktemp("adapter")
    moved(with_adapter(load(tiny_model_dir), lora(), seed=0)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


def train(
    model_dir: Path, dataset: Path | str, output_dir: Path, *, use_peft: bool = True, **changes: Any
) -> GVPOTrainer:
    """`gvpo-offline train` in this process."""
    model = {
        name: changes.pop(name)
        for name in ("load_in_4bit", "load_in_8bit", "dtype")
        if name in changes
    }
    data = {name: changes.pop(name) for name in ("reference", "eval_dataset") if name in changes}
    args = {"learning_rate": 1e-2, "reference_check": "error", **changes}
    return run_train(
        model=ModelSettings(str(model_dir), **model),
        data=DataSettings(str(dataset), **{"reference": "base", **data}),
        lora=LoraSettings(use_peft=use_peft, lora_r=2, lora_target_modules=TARGETS),
        run=RunSettings(),
        args=config_of(output_dir, **args),
    )


# ---- a folder with an adapter ----


def test_a_folder_with_an_adapter_is_its_base_with_the_adapter_on(
    tiny_model_dir: Path, adapter_dir: Path
) -> None:
    model = load_policy(ModelSettings(str(adapter_dir)))
    truth = moved(with_adapter(load(tiny_model_dir), lora(), seed=0))
    assert isinstance(model, PeftModel)
    torch.testing.assert_close(logits(model), logits(truth), rtol=0, atol=0)
    assert (logits(model) - logits(load(tiny_model_dir))).abs().max() > 0.01
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_a_hash_covers_base_adapter_and_scale(tiny_model_dir: Path, adapter_dir: Path) -> None:
    """Switched off, it is the base's own, whichever modules PEFT has put between."""
    base = load(tiny_model_dir)
    alone = weights_sha256(base)
    model = load_policy(ModelSettings(str(adapter_dir)))
    assert policy_sha256(base) == alone
    on = policy_sha256(model)
    with adapter_disabled(model) as inner:
        assert policy_sha256(inner) == policy_sha256(model) == alone
        torch.testing.assert_close(logits(inner), logits(base), rtol=0, atol=0)
    assert policy_sha256(model) == on != alone
    others = [
        moved(with_adapter(load(tiny_model_dir), lora(), seed=0), seed=1),
        moved(with_adapter(load(tiny_model_dir), lora(lora_alpha=8), seed=0)),
        moved(with_adapter(load(tiny_model_dir), lora(use_rslora=True), seed=0)),
    ]
    again = moved(with_adapter(load(tiny_model_dir), lora(lora_dropout=0.5), seed=0))
    assert policy_sha256(again) == on
    assert len({on, alone, *map(policy_sha256, others)}) == 5
    saved = lora(modules_to_save=["lm_head"], target_modules=["o_proj", "embed_tokens"])
    untied = tiny_model("llama")
    before = weights_sha256(untied)
    with adapter_disabled(with_adapter(untied, saved, seed=0)) as inner:
        assert policy_sha256(inner) == before


def test_a_reference_may_be_an_adapter_on_its_base(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path, adapter_dir: Path
) -> None:
    """Its log-probs are the policy's, which training that continues it starts from."""
    root = copy_of(unscored, tmp_path / "data")
    (family,) = score(root, adapter_dir).manifest.references
    assert family.model_class == "PeftModelForCausalLM"
    run = train(
        adapter_dir, root, tmp_path / "on", use_peft=False, reference=None, reference_check="auto"
    )
    assert run.policy.weights_sha256 == family.weights_sha256
    assert lines_of(run, "log_ratio_std")[0] < 1e-4
    with pytest.raises(IntegrityError, match="starts as the reference"):
        train(tiny_model_dir, root, tmp_path / "base", reference=None)


def test_a_run_that_trained_an_adapter_is_evaluated_and_continued(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    root = copy_of(unscored, tmp_path / "data")
    out = tmp_path / "run"
    trainer = train(tiny_model_dir, root, out, eval_dataset=str(root), eval_strategy="epoch")
    assert {path.name for path in out.iterdir()} >= {"adapter_config.json", "tokenizer.json"}
    settings = {"dataset": str(root), "beta": 0.5, "use_cpu": True, "show_progress": False}
    report = run_evaluate(EvaluateConfig(model_name_or_path=str(out), **settings))
    expected = lines_of(trainer, "eval_explained_variance")[-1]
    assert expected > 0.01
    assert report.metrics["explained_variance"] == pytest.approx(expected, abs=1e-5)
    # One step over all groups: its loss, before the update, is that of the evaluation. Weights are
    # the same, so what differs is the rounding of log-probs.
    one_step = {"groups_per_step": 24, "use_peft": False, "reference_check": "off"}
    more = train(out, root, tmp_path / "more", **one_step)
    assert more.data.reference == trainer.data.reference  # the base's, as before
    assert lines_of(more) == pytest.approx([report.metrics["loss"]], rel=ROUNDING)
    assert (tmp_path / "more" / "adapter_model.safetensors").is_file()


def test_adapters_that_cannot_be_taken(
    tmp_path: Path, unscored: Path, tiny_model_dir: Path, adapter_dir: Path
) -> None:
    both = copy_of(adapter_dir, tmp_path / "both")
    shutil.copy(tiny_model_dir / "config.json", both)
    with pytest.raises(ConfigError, match="a folder holds a model or an adapter"):
        load_policy(ModelSettings(str(both)))
    with pytest.raises(ConfigError, match=r"model that has none.*Leave use_peft out"):
        train(adapter_dir, unscored, tmp_path / "run")
    orphan = copy_of(adapter_dir, tmp_path / "orphan")
    text = (orphan / "adapter_config.json").read_text().replace(str(tiny_model_dir), "/nowhere")
    (orphan / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match="/nowhere"):
        load_policy(ModelSettings(str(orphan)))
    from transformers import AutoModelForCausalLM

    frozen = AutoModelForCausalLM.from_pretrained(adapter_dir)
    with pytest.raises(ConfigError, match="weights to train"):
        check_trainable(frozen)


# ---- the base as reference ----


@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "all weights"])
def test_the_base_is_scored_once_by_the_policy_itself(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path, use_peft: bool
) -> None:
    """The very files that `gvpo-offline reference` writes, and the very run on them."""
    ahead, here = (copy_of(unscored, tmp_path / name) for name in ("ahead", "here"))
    score(ahead, tiny_model_dir, max_tokens_per_micro_batch=200)
    runs = [
        train(tiny_model_dir, root, tmp_path / f"run {n}", use_peft=use_peft)
        for n, root in enumerate((ahead, here, here))
    ]
    assert sidecars(here) == sidecars(ahead)
    assert open_dataset(here).manifest.version == open_dataset(ahead).manifest.version
    step = open_dataset(here).manifest.lineage[-1]
    assert (step.stage, step.config["model_name_or_path"]) == ("reference", str(tiny_model_dir))
    name = "adapter_model.safetensors" if use_peft else "model.safetensors"
    one, two, three = (load_file(tmp_path / f"run {n}" / name) for n in range(3))
    assert same_weights(one, two)
    assert same_weights(one, three)
    assert lines_of(runs[1], "log_ratio_std")[0] < 1e-4
    assert lines_of(runs[1], "log_ratio_std")[-1] > 1e-3


def test_an_adapter_that_has_moved_has_the_base_as_reference(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path, adapter_dir: Path
) -> None:
    ahead, here = (copy_of(unscored, tmp_path / name) for name in ("ahead", "here"))
    score(ahead, tiny_model_dir, max_tokens_per_micro_batch=200)
    run = train(adapter_dir, here, tmp_path / "run", use_peft=False, reference_check="auto")
    assert sidecars(here) == sidecars(ahead)
    assert lines_of(run, "log_ratio_std")[0] > 0.1


def test_ranks_share_the_scoring_out(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    ahead, here = (copy_of(unscored, tmp_path / name) for name in ("ahead", "here"))
    score(ahead, tiny_model_dir, max_tokens_per_micro_batch=200)
    argv = command(tiny_model_dir, here, tmp_path / "run")
    for status, output in server.run_ranks(argv, 2):
        assert status == 0, output
    assert sidecars(here) == sidecars(ahead)
    assert len(list((here / "commits").glob("reference-*/*.json"))) == 3
    same = {"max_steps": 2, "learning_rate": 1e-3, "adam_epsilon": ADAM_EPSILON}
    run = train(tiny_model_dir, here, tmp_path / "one", **same)
    two = load_file(tmp_path / "run" / "adapter_model.safetensors")
    one = load_file(Path(run.args.output_dir) / "adapter_model.safetensors")
    assert largest_difference(one, two) <= adam_rounding(2)


def command(model_dir: Path, dataset: Path, output_dir: Path) -> list[str]:
    """Two steps of `gvpo-offline train`, with an adapter, as `train` above."""
    settings = {
        "model_name_or_path": model_dir,
        "dataset": dataset,
        "reference": "base",
        "use_peft": "true",
        "lora_r": 2,
        "lora_target_modules": "[q_proj, v_proj, down_proj]",
        "output_dir": output_dir,
        "beta": 0.5,
        "groups_per_step": 8,
        "max_tokens_per_micro_batch": 200,
        "learning_rate": 1e-3,
        "adam_epsilon": ADAM_EPSILON,
        "max_steps": 2,
        "seed": 1,
        "save_strategy": "no",
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    return ["train", *(str(x) for name, value in settings.items() for x in (f"--{name}", value))]


def test_what_one_rank_meets_ends_all(
    tmp_path: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    """A group too long: one line from each, and nobody waits."""
    root = unscored_dataset(tmp_path / "data", tiny_model_dir, 9, response_tokens=300)
    for status, output in server.run_ranks(command(tiny_model_dir, root, tmp_path / "run"), 2):
        assert status == 1
        assert "fit into max_tokens_per_micro_batch" in output
        assert "Traceback" not in output


def test_bases_that_cannot_be_scored(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="a dataset in a local folder"):
        train(tiny_model_dir, "s3://bucket/data", tmp_path / "run")
    file = next((unscored / "groups").glob("*.parquet"))
    with pytest.raises(
        ConfigError, match=r"a dataset in a local folder.*\.parquet.*leave `reference` out"
    ):
        train(tiny_model_dir, file, tmp_path / "run")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"not writable.*gvpo-offline reference"):
        train(tiny_model_dir, unscored, tmp_path / "run")
    assert sidecars(unscored) == {}


def test_several_datasets_have_one_base(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Those to train on and those to evaluate on; each is scored, by the one model."""
    first, second, held_out = (copy_of(unscored, tmp_path / str(n)) for n in range(3))
    score(first, tiny_model_dir)
    asked = [DatasetSettings(path=str(p), reference="base") for p in (first, second, held_out)]
    data = DataSettings(datasets=asked[:2], eval_datasets=asked[2:])
    run = run_train(
        model=ModelSettings(str(tiny_model_dir)),
        data=data,
        lora=LoraSettings(use_peft=True, lora_target_modules=TARGETS),
        run=RunSettings(),
        args=config_of(tmp_path / "run", eval_strategy="epoch", reference_check="error"),
    )
    assert sidecars(first) == sidecars(second) == sidecars(held_out)
    names = {dataset.reference for dataset in asked}
    assert names == {"base"}  # what the user said is left as it is
    assert len(run.data.datasets()) == 3
    older = DatasetSettings(path=str(first), reference="base", version=1)
    with pytest.raises(ConfigError, match=r"newest version of a dataset.*version 1"):
        run_train(
            model=ModelSettings(str(tiny_model_dir)),
            data=DataSettings(datasets=[older]),
            lora=LoraSettings(),
            run=RunSettings(),
            args=config_of(tmp_path / "older"),
        )
