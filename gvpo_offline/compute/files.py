"""Where a model's weights are: a folder or hub name, and the GGUF file in it if there is one.

A GGUF file holds weights, configuration and tokenizer. Loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo_offline.errors import ConfigError

_SUFFIX = ".gguf"
# transformers' errors about an architecture, and those of the package gguf about a data type.
_ARCHITECTURE = re.compile(r"GGUF model with architecture (\S+) is not|gguf model_type: (\S+) in")
_DATA_TYPE = re.compile(r"Dequantization for (\S+) is not")
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
# A folder with one of these files has a tokenizer of its own beside a GGUF file.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class ModelFiles:
    """What `from_pretrained` is given.

    Attributes:
        name: a folder or a hub name.
        gguf_file: the GGUF file in it that holds the weights; None: weights in another format.
    """

    name: str
    gguf_file: str | None = None

    def __str__(self) -> str:
        """The name, and with a GGUF file its path; `model_files` reads it back."""
        return self.name if self.gguf_file is None else f"{self.name}/{self.gguf_file}"

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of `from_pretrained`; empty without a GGUF file.

        Raises:
            ConfigError: the package that reads GGUF files is not installed.
        """
        if self.gguf_file is None:
            return {}
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(
                "GGUF files are read with the package gguf",
                received=f"{self}, and gguf is not installed",
                remedy="pip install 'gvpo-offline[gguf]'",
            )
        return {"gguf_file": self.gguf_file}

    @property
    def tokenizer_options(self) -> dict[str, Any]:
        """As `options`; empty too if the folder has a tokenizer beside the GGUF file."""
        folder = Path(self.name)
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return {}
        return self.options


def model_files(name_or_path: str, gguf_file: str | None = None) -> ModelFiles:
    """The files of a model or of a tokenizer.

    Args:
        name_or_path: a folder, a hub name, or either one followed by `/` and the name of a GGUF
            file in it.
        gguf_file: name of the GGUF file in the folder or hub repository. Default: that of
            `name_or_path`; or the only one in a folder without other weights.

    Raises:
        ConfigError: both arguments name a GGUF file, the folder has no such file, or it has several
            GGUF files and no other weights.
    """
    folder, _, last = name_or_path.rpartition("/")
    if last.endswith(_SUFFIX) and not Path(name_or_path).is_dir():
        if gguf_file not in (None, last):
            raise ConfigError(
                "a model is loaded from one GGUF file",
                received=f"{name_or_path} and gguf_file: {gguf_file}",
                remedy="leave gguf_file out",
            )
        return _checked(ModelFiles(folder or ".", last))
    if gguf_file is not None:
        return _checked(ModelFiles(name_or_path, gguf_file))
    return ModelFiles(name_or_path, _only_gguf_file(Path(name_or_path)))


def _checked(files: ModelFiles) -> ModelFiles:
    folder = Path(files.name)
    if folder.is_dir() and not (folder / str(files.gguf_file)).is_file():
        held = ", ".join(sorted(path.name for path in folder.glob(f"*{_SUFFIX}")))
        raise ConfigError(
            "the GGUF file is in the model's folder",
            received=f"{files.gguf_file}, and a folder that holds {held or 'no GGUF file'}",
            remedy="correct gguf_file",
            file=folder,
        )
    return files


def _only_gguf_file(folder: Path) -> str | None:
    """The GGUF file of a folder without other weights; None for other folders and hub names."""
    if not folder.is_dir():
        return None
    found = sorted(path.name for path in folder.glob(f"*{_SUFFIX}"))
    if not found or any(any(folder.glob(pattern)) for pattern in _OTHER_WEIGHTS):
        return None
    if len(found) > 1:
        raise ConfigError(
            "a model is loaded from one GGUF file",
            received=", ".join(found),
            remedy="set gguf_file to one of them, or name it by its path",
            file=folder,
        )
    return found[0]


def gguf_refusal(files: ModelFiles, error: Exception) -> ConfigError | None:
    """What an error of `from_pretrained` means if transformers cannot read a GGUF file's content.

    Args:
        files: what `from_pretrained` was given.
        error: what it raised.

    Returns:
        The error that names the architecture, or the data type of weights, that is not read; None
        if the error is about something else.
    """
    if files.gguf_file is None:
        return None
    if found := _ARCHITECTURE.search(str(error)):
        return ConfigError(
            "a GGUF file is of an architecture whose weights transformers dequantises",
            received=f"{str(files)!r} of the architecture {found[1] or found[2]!r}",
            remedy="use the model's safetensors (model_name_or_path: the folder or hub name with "
            "config.json), or a version of transformers that reads the architecture",
        )
    if found := _DATA_TYPE.search(str(error)):
        return ConfigError(
            "the weights of a GGUF file are of a data type that the package gguf dequantises",
            received=f"{str(files)!r} with weights of type {found[1]}",
            remedy="use a file with other types (Q8_0, F16), or the model's safetensors",
        )
    return None
