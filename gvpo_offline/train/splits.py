"""What Python users pass as datasets and is not what a run trains on: splits, and other shapes.

`datasets.load_dataset` without a split gives a `DatasetDict`. As a mapping it would be a mix, and
the run would train on its test split.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.train.foreign import PAGE

logger = logging.getLogger(__name__)
# Names of held-out splits; of several, the first is held out.
_HELD_OUT = ("validation", "valid", "val", "dev", "eval", "evaluation", "test")
# Shapes of TRL's datasets: the columns that tell one, and how it becomes groups.
_IMPORT = (
    "write it with to_parquet and run `gvpo-offline import --format {}`, then "
    "`gvpo-offline reference`"
)
_SCORED = "import several scored responses to each prompt with `gvpo-offline import`"
_SAMPLE = (
    "write it with to_parquet, sample responses with `gvpo-offline sample`, then run "
    "`gvpo-offline reward` and `gvpo-offline reference`"
)
_SHAPES = (
    (("chosen", "rejected"), "preferences in TRL's format", _IMPORT.format("preference")),
    (
        ("prompt", "completion", "label"),
        "unpaired preferences in TRL's format",
        _IMPORT.format("unpaired"),
    ),
    (("messages",), "conversations, as for supervised training", _SCORED),
    (("prompt", "completion"), "prompts with one completion and no reward", _SCORED),
    (("prompt",), "prompts without responses, as for TRL's GRPOTrainer", _SAMPLE),
    (("text",), "texts, as for supervised training", _SCORED),
)


def chosen_splits(train: Any, held_out: Any, eval_fraction: float) -> tuple[Any, Any]:
    """The training and held-out datasets of a run, with the splits of a DatasetDict told apart.

    Of a DatasetDict, the split `train` is trained on. A validation or test split is held out if
    there is no `eval_dataset` and `eval_fraction` is 0. The log says what is done with each split.

    Args:
        train: the argument `train_dataset`.
        held_out: the argument `eval_dataset`.
        eval_fraction: the setting.

    Raises:
        ConfigError: there is no split `train`; `held_out` is a DatasetDict; or a dictionary that
            is not a DatasetDict has the names of splits.
        DataError: a dataset in memory has no groups but another shape that is known.
    """
    _refuse_splits(held_out, "eval_dataset")
    if not _is_dataset_dict(train):
        _refuse_named_like_splits(train)
    else:
        train, held_out = _of_dataset_dict(train, held_out, eval_fraction)
    for data in (train, held_out):
        for item in _parts(data):
            check_columns(item)
    return train, held_out


def _of_dataset_dict(train: Any, held_out: Any, eval_fraction: float) -> tuple[Any, Any]:
    if "train" not in train:
        raise ConfigError(
            "of a DatasetDict, the split train is trained on",
            received=f"the splits {', '.join(map(str, train))}",
            remedy="pass one split as train_dataset, for example data['…']",
        )
    name = next((own for own in _HELD_OUT if own in train), None)
    if held_out is not None or eval_fraction > 0:
        name = None
    unused = [str(own) for own in train if own not in ("train", name)]
    logger.info(
        "of the DatasetDict, the split train is trained on%s%s",
        f", the split {name} is held out" if name else "",
        f"; not used: {', '.join(unused)}" if unused else "",
    )
    return train["train"], held_out if name is None else train[name]


def _refuse_splits(data: Any, argument: str) -> None:
    if _is_dataset_dict(data):
        raise ConfigError(
            f"{argument} is one split of a DatasetDict",
            received=f"all of its splits: {', '.join(map(str, data))}",
            remedy=f"pass one, for example {argument}=data['{next(iter(data), '…')}']",
        )


def _refuse_named_like_splits(data: Any) -> None:
    held_out = [str(own) for own in data if own in _HELD_OUT] if isinstance(data, Mapping) else []
    if held_out and "train" in data:
        raise ConfigError(
            "a dictionary as train_dataset is a mix, and a run trains on every dataset of a mix",
            received=f"one named train and one named {held_out[0]}",
            remedy=f"pass train_dataset=data['train'], eval_dataset=data['{held_out[0]}']; if both "
            "are to be trained on, give them other names",
        )


def refuse_dataset_dict(data: Any) -> None:
    """Raise ConfigError if the dataset to evaluate is a DatasetDict, or has another known shape."""
    _refuse_splits(data, "the dataset to evaluate")
    for item in _parts(data):
        check_columns(item)


def check_columns(data: Any) -> None:
    """Raise DataError if a `datasets.Dataset` has a shape of TRL's datasets instead of groups."""
    columns = set(getattr(data, "column_names", None) or ())
    if not columns or not hasattr(data, "to_parquet") or "prompt_token_ids" in columns:
        return
    for needed, shape, remedy in _SHAPES:
        if columns.issuperset(needed):
            raise DataError(
                "a dataset to train on has a group in each row: token ids of one prompt and of its "
                "responses, rewards, and log-probs of the reference",
                received=f"{shape} (columns {', '.join(sorted(columns))})",
                remedy=f"{remedy}; see {PAGE}",
            )


def _parts(data: Any) -> list[Any]:
    if isinstance(data, Mapping):
        return list(data.values())
    return list(data) if isinstance(data, list | tuple) else [data]


def _is_dataset_dict(data: Any) -> bool:
    datasets = sys.modules.get("datasets")  # without it there is none
    return datasets is not None and isinstance(
        data, datasets.DatasetDict | datasets.IterableDatasetDict
    )
