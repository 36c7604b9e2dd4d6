"""Demo of the pipeline without external resources: trains a tiny model, serves it, runs GVPO.

    python pipelines/math_server/demo.py --output_dir runs/math_demo

The model, a Llama of about 70,000 parameters, is pretrained on sums of two numbers with two kinds
of answers: "it is" with the right sum, and "may be" with a sum that is one or two too large.
`transformers serve` serves it on the loopback interface; `run.py` runs the stages. The policy that
GVPO trains on the scored answers prefers the first kind, for held-out sums as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import run
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LARGEST = 12
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SERVER_START_S = 120.0


def question(a: int, b: int) -> str:
    """The prompt for a sum."""
    return f"what is {a} + {b} ?"


def write_prompts(path: Path, n: int, rng: random.Random) -> None:
    """Write `n` different prompts with their answers as JSON lines."""
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    rows = [{"prompt": question(a, b), "answer": str(a + b)} for a, b in rng.sample(pairs, n)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template."""
    marks = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
    numbers = map(str, range(2 * LARGEST + 3))
    words = [*marks, "what", "is", "+", "?", "it", "may", "be", *numbers]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(folder: Path, steps: int, rng: random.Random) -> None:
    """Pretrain the model for `steps` steps of 128 sums and save it."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # `transformers serve` decodes greedily, whatever the temperature, unless the model's
    # generation_config.json has do_sample.
    model.generation_config.do_sample = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in tqdm(range(steps), desc="pretrain", unit="step"):
        ids = torch.tensor(tokenizer([_lesson(rng) for _ in range(128)])["input_ids"])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _lesson(rng: random.Random) -> str:
    a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
    said = f"may be {a + b + rng.choice((1, 2))}" if rng.random() < 0.5 else ""
    return f"<user> {question(a, b)} <assistant> {said or f'it is {a + b}'} <eos>"


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """Run `transformers serve` on a free port until the block ends; yields the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"],
            stdout=output,
            stderr=output,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            _wait_until_healthy(process, f"http://localhost:{port}/health", log)
            yield f"http://localhost:{port}/v1"
        finally:
            process.terminate()
            process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(int(SERVER_START_S / 0.2)):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"transformers serve did not start; see {log}")


def main(argv: Sequence[str] | None = None) -> None:
    """Make prompts, model and server, then run the pipeline."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/math_demo"))
    parser.add_argument("--prompts", type=int, default=120, help="number of prompts, at most 169")
    parser.add_argument("--pretrain_steps", type=int, default=400)
    given = parser.parse_args(argv)
    out: Path = given.output_dir
    prompts, model = out / "prompts.jsonl", out / "model"
    rng = random.Random(0)
    write_prompts(prompts, given.prompts, rng)
    if not (model / "config.json").exists():
        make_model(model, given.pretrain_steps, rng)
    with served(model, out / "server.log") as url:
        places = {"prompts": prompts, "model": model, "base_url": url, "output_dir": out}
        run.main([part for name, place in places.items() for part in (f"--{name}", str(place))])


if __name__ == "__main__":
    main()
