"""Makes the tutorial's model: a Qwen3 of 200,000 weights that knows shops, and no prices.

    python examples/tutorial/make_model.py --output_dir runs/tutorial/model

It stands for the pretrained model that you would name instead. Half a minute on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines" / "quickstart"))

from models import make_tokenizer, new_model, policy_config, pretrain

SEED, STEPS = 0, 700


def main() -> None:
    """Pretrain the model and save it with its tokenizer."""
    parser = argparse.ArgumentParser(description="Make the tutorial's model.")
    parser.add_argument("--output_dir", required=True)
    folder = parser.parse_args().output_dir
    tokenizer = make_tokenizer()
    model = new_model(policy_config(tokenizer), SEED)
    pretrain(model, tokenizer, steps=STEPS, seed=SEED, title="pretrain")
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    print(f"{model.num_parameters():,} weights in {folder}")


if __name__ == "__main__":
    main()
