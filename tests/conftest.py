"""Small real parts that many tests share: a trained tokenizer and a model of a few thousand
weights.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from support.fork_server import ForkServer
from support.tiny_policy import make_tiny_model, train_tokenizer

# No test depends on speed: hypothesis would refuse an example of more than 200 ms.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Exempt what the imports made from garbage collection, and collect less often.

    accelerate runs a full collection for each training: over the million objects of torch and
    transformers that takes a quarter of a second, more than the training of a tiny model.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of `train_tokenizer`."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A folder with the model of `make_tiny_model`."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), tiny_tokenizer_dir)


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Where command lines run, each in a process of its own."""
    started = ForkServer()
    yield started
    started.close()
