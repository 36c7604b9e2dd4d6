"""The trainer accepts a Parquet file of another program without conversion."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCHEMAS = Path(__file__).parents[2] / "schemas"


def test_a_parquet_file_that_follows_the_schemas_trains(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """The first example of schemas/README.md writes the file; then two steps of one group each."""
    import torch
    from transformers import AutoModelForCausalLM

    from gvpo_offline import GVPOConfig, GVPOTrainer

    text = (SCHEMAS / "README.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = GVPOConfig(
        output_dir=str(tmp_path / "run"),
        learning_rate=1e-3,
        groups_per_step=1,
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GVPOTrainer(model, args, train_dataset=tmp_path / "groups.parquet")
    trainer.train()
    assert trainer.state.global_step == 2
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    assert all(line["loss"] == pytest.approx(line["loss"]) for line in lines)  # not nan
    after = model.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
