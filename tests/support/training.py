"""Datasets with a tiny model as reference, and trainers on them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from support.builders import build_dataset, make_group
from support.rounding import ADAM_EPSILON
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from gvpo_offline import GVPOConfig, GVPOTrainer
from gvpo_offline.errors import GVPOError
from gvpo_offline.reference.score import run_reference
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.tokenizer import tokenizer_info

VOCAB_SIZE = 300
State = dict[str, torch.Tensor]


def unscored_dataset(root: Path, model_dir: Path, n_groups: int = 24, **options: Any) -> Path:
    """Groups with rewards and with token ids of the model, without a reference."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    build_dataset(
        root,
        n_groups,
        **{
            "reference": False,
            "vocab_size": VOCAB_SIZE,
            "tokenizer": tokenizer_info(tokenizer),
            **options,
        },
    )
    return root


def score(root: Path, model_dir: Path, **changes: Any) -> GroupDataset:
    """Compute the reference log-probs of a dataset with the model, and open it."""
    settings: dict[str, Any] = {"use_cpu": True, "show_progress": False, **changes}
    run_reference(ReferenceConfig(str(model_dir), dataset=str(root), **settings))
    return open_dataset(root)


def scored_dataset(root: Path, model_dir: Path, n_groups: int = 24, **options: Any) -> GroupDataset:
    """`unscored_dataset` with reference log-probs."""
    return score(unscored_dataset(root, model_dir, n_groups, **options), model_dir)


def unequal_dataset(root: Path, model_dir: Path, n_groups: int = 25) -> GroupDataset:
    """Scored groups of 2 to 12 responses of 1 to 60 tokens, with very different costs."""
    groups = [
        make_group(
            i,
            k=2 + (7 * i) % 11,
            response_tokens=60 if i % 8 == 0 else None,
            vocab_size=VOCAB_SIZE,
            scored=False,
            masked=i % 3 == 0,
        )
        for i in range(n_groups)
    ]
    return scored_dataset(root, model_dir, groups=groups)


def train_command(
    dataset: GroupDataset, model_dir: Path, output_dir: Path, **changes: Any
) -> list[str]:
    """`train` for one epoch in steps of 12 groups; with 25 groups the third step has one."""
    settings = {
        "model_name_or_path": model_dir,
        "dataset": dataset.root,
        "eval_dataset": dataset.root,
        "output_dir": output_dir,
        "beta": 0.5,
        "groups_per_step": 12,
        "num_train_epochs": 1,
        "max_tokens_per_micro_batch": 150,
        "learning_rate": 1e-3,
        "adam_epsilon": ADAM_EPSILON,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_steps": 2,
        "use_cpu": "true",
        "disable_tqdm": "true",
        **changes,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["train", *flags]


def config_of(output_dir: Path, **changes: Any) -> GVPOConfig:
    """Settings of a short run: 8 groups per step, several micro-batches, every step logged."""
    settings: dict[str, Any] = {
        "beta": 0.5,
        "groups_per_step": 8,
        "max_tokens_per_micro_batch": 200,
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        **changes,
    }
    return GVPOConfig(output_dir=str(output_dir), **settings)


def trainer_of(
    model: Any,
    train_dataset: Any,
    output_dir: Path,
    *,
    eval_dataset: Any = None,
    callbacks: Any = None,
    peft_config: Any = None,
    tokenizer: Any = None,
    **changes: Any,
) -> GVPOTrainer:
    """A trainer with `config_of`'s settings; for a model folder, with the folder's tokenizer."""
    if isinstance(model, Path):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
        model = str(model)
    return GVPOTrainer(
        model,
        config_of(output_dir, **changes),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=peft_config,
    )


def longest_row(dataset: GroupDataset) -> tuple[int, tuple[str, int, str]]:
    """Input tokens of the longest prompt with one response, and its file, row and group.

    Found by reading all groups. The last token of a response is not an input.
    """
    longest, place, number = 0, ("", 0, ""), 0
    for entry in dataset.manifest.groups:
        row = 0
        for _ in entry.row_groups:
            for group in dataset.groups(number):
                width = len(group.prompt_token_ids) + max(group.response_lengths) - 1
                if width > longest:
                    path = str(dataset.folder / entry.path)
                    longest, place = width, (path, row, group.group_id)
                row += 1
            number += 1
    return longest, place


def place_of(error: GVPOError) -> tuple[str | None, int | None, str | None]:
    """File, row and group that an error names."""
    return error.file, error.row, error.group


def load(model_dir: Path) -> torch.nn.Module:
    """The bare model, in float32."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return model


class Recorder(TrainerCallback):
    """Records the gradient of each step before clipping."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.gradients.append(grads)


def weights_of(trainer: GVPOTrainer) -> State:
    """A copy of the policy's weights."""
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same_weights(one: State, other: State) -> bool:
    """Whether all weights are bitwise equal."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def largest_difference(one: State, other: State) -> float:
    """The largest difference of any weight."""
    assert one.keys() == other.keys()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)


def lines_of(trainer: GVPOTrainer, key: str = "loss") -> list[float]:
    """All logged values of a metric, in order."""
    return [line[key] for line in trainer.state.log_history if key in line]


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def sidecars(root: Path) -> dict[str, bytes]:
    """Content of every reference file of a dataset, by path."""
    found = sorted((root / "reference").rglob("*.parquet"))
    return {str(path.relative_to(root)): path.read_bytes() for path in found}
