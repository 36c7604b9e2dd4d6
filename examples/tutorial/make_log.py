"""Writes the tutorial's log: 300 shopping lists with 5 to 7 answers each, and what each one saved.

    python examples/tutorial/make_log.py --output_dir runs/log

Lists, prices and models are those of the quickstart (pipelines/quickstart/task.py). Two models, an
earlier checkpoint and a scripted person wrote the answers; none of them knows a price. The result
is `log.jsonl`, as it stands beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines" / "quickstart"))

from logs import write_logs
from models import make_tokenizer, new_model, other_config, pretrain
from quickstart import PRETRAIN_STEPS, make_policy
from task import split_prompts

SEED, N_LOGGED, N_NEW = 11, 300, 0


def main() -> None:
    """Pretrain the models, let all four samplers answer, and join their files."""
    parser = argparse.ArgumentParser(description="Write the tutorial's log.")
    parser.add_argument("--output_dir", default="runs/log")
    folder = Path(parser.parse_args().output_dir)
    prompts, _ = split_prompts(SEED, N_LOGGED, N_NEW)
    tokenizer = make_tokenizer()
    policy, older = make_policy(tokenizer, seed=0)  # the quickstart's
    other = new_model(other_config(tokenizer), SEED)
    pretrain(other, tokenizer, steps=PRETRAIN_STEPS, seed=SEED, title="pretrain: other model")
    models = {"older": older, "other": other, "policy": policy}
    write_logs(folder / "parts", prompts, tokenizer, **models, seed=SEED)
    rows = [
        json.loads(line)
        for part in sorted((folder / "parts").glob("*.jsonl"))
        for line in part.read_text(encoding="utf-8").splitlines()
    ]
    place = {prompt: number for number, prompt in enumerate(prompts)}
    rows.sort(key=lambda row: place[row["question"]])  # as a service logs: by question
    text = "".join(json.dumps({**row, "saved": round(row["saved"], 4)}) + "\n" for row in rows)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
