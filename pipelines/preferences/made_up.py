"""Generate synthetic preferences in the format of UltraFeedback, and a small model; no network.

    python pipelines/preferences/made_up.py --output_dir runs/made-up

    ultrafeedback.parquet   format of openbmb/UltraFeedback: an instruction, four scored completions
    pairs.parquet           format of HuggingFaceH4/ultrafeedback_binarized: the best and another
    model/                  a Qwen3 of 86,000 parameters; its tokenizer has a chat template

An instruction asks for things of several kinds ("Name 2 fruits and 3 tools ."). Each of eight
simulated writers names some things of the right kind, some of a wrong kind, omits some, and may
begin with "Certainly". The score mostly measures how much of the list is right, and to a small part
the politeness. The model is pretrained on a writer who names random things. Everything is a
function of the seed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

KINDS = {
    "animals": ["cat", "dog", "horse", "owl", "fox", "whale"],
    "colours": ["red", "blue", "green", "yellow", "black", "white"],
    "fruits": ["apple", "pear", "plum", "cherry", "lemon", "fig"],
    "tools": ["hammer", "saw", "drill", "wrench", "chisel", "file"],
    "metals": ["iron", "gold", "silver", "copper", "tin", "lead"],
    "rivers": ["Rhine", "Nile", "Volga", "Congo", "Thames", "Seine"],
}
POLITE = "Certainly"
# (skill, politeness): the probability of a right thing, which also lowers that of an omission, and
# the probability of a polite beginning.
WRITERS = {f"writer-{i}": (0.3 + 0.09 * i, (i % 4) / 3) for i in range(8)}
RANDOM_WRITER = (0.0, 0.5)
PAD, EOS, UNKNOWN, USER, ASSISTANT = "<pad>", "<eos>", "<unk>", "<user>", "<assistant>"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
IGNORED = -100

Ask = list[tuple[int, str]]
Row = dict[str, Any]


def make_ask(rng: random.Random) -> Ask:
    """A request for two or three kinds of things, one to four of each."""
    return [(rng.randint(1, 4), kind) for kind in rng.sample(list(KINDS), rng.choice((2, 3)))]


def instruction_of(ask: Ask) -> str:
    """The text of a request."""
    return f"Name {' and '.join(f'{n} {kind}' for n, kind in ask)} ."


def write(ask: Ask, writer: tuple[float, float], rng: random.Random) -> str:
    """A writer's answer: a polite word or none, then one word per thing that is not omitted."""
    skill, manners = writer
    words = [POLITE] if rng.random() < manners else []
    for n, kind in ask:
        for _ in range(n):
            if rng.random() < 0.3 * (1 - skill):
                continue
            right = rng.random() < skill
            words.append(rng.choice(KINDS[kind if right else rng.choice(list(KINDS))]))
    return " ".join(words) or rng.choice(KINDS[ask[0][1]])


def judge(ask: Ask, answer: str) -> dict[str, int]:
    """Ratings of the four aspects, 1 to 5."""
    words = answer.split()
    polite = words[0] == POLITE
    things = words[polite:]
    asked = sum(n for n, _ in ask)
    right = sum(min(n, sum(word in KINDS[kind] for word in things)) for n, kind in ask)
    return {
        "helpfulness": 1 + round(3 * right / asked) + polite,
        "honesty": 4 + polite,
        "instruction_following": 1 + round(4 * right / asked),
        "truthfulness": 1 + round(4 * right / max(len(things), 1)),
    }


def completion(ask: Ask, name: str, rng: random.Random) -> Row:
    """One completion with its ratings, in the format of UltraFeedback."""
    answer = write(ask, WRITERS[name], rng)
    ratings = judge(ask, answer)
    mean = sum(ratings.values()) / len(ratings)
    rated: dict[str, Row] = {
        aspect: {"Rating": str(rating), "Rationale": "The list was checked."}
        for aspect, rating in ratings.items()
    }
    for aspect in ("helpfulness", "truthfulness"):
        rated[aspect] |= {"Type": ["1"], "Rationale For Rating": "The list was checked."}
    return {
        "annotations": rated,
        "critique": "Name what was asked for, and nothing else.",
        "custom_system_prompt": "You are a helpful assistant.",
        "fine-grained_score": mean,
        "model": name,
        "overall_score": float(round(1 + 9 * (mean - 1) / 4)),
        "principle": "helpfulness",
        "response": answer,
    }


def make_rows(n: int, rng: random.Random) -> list[Row]:
    """`n` different instructions, each answered by four of the writers."""
    asks: dict[str, Ask] = {}
    while len(asks) < n:
        ask = make_ask(rng)
        asks[instruction_of(ask)] = ask
    rows = []
    for instruction, ask in asks.items():
        names = rng.sample(list(WRITERS), 4)
        rows.append(
            {
                "source": "made_up",
                "instruction": instruction,
                "models": names,
                "completions": [completion(ask, name, rng) for name in names],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            }
        )
    return rows


def pair_of(number: int, row: Row, rng: random.Random) -> Row:
    """The best completion and a random other one, as messages with their scores."""
    best, *others = sorted(row["completions"], key=lambda c: -float(c["overall_score"]))
    other = rng.choice(others)
    user = {"content": row["instruction"], "role": "user"}
    chosen, rejected = (
        [user, {"content": c["response"], "role": "assistant"}] for c in (best, other)
    )
    return {
        "prompt": row["instruction"],
        "prompt_id": f"{number:08d}",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": best["overall_score"],
        "score_rejected": other["overall_score"],
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template."""
    words = [PAD, EOS, UNKNOWN, USER, ASSISTANT, "Name", "and", ".", POLITE, *"1234", *KINDS]
    words += [thing for things in KINDS.values() for thing in things]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> Qwen3ForCausalLM:
    """A small model, pretrained on the writer who names random things."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    bar = tqdm(range(steps), desc="pretrain", unit="step")
    for step in bar:
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        asks = [make_ask(rng) for _ in range(32)]
        loss = model(**padded(tokenizer, asks, [write(a, RANDOM_WRITER, rng) for a in asks])).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model


def padded(
    tokenizer: PreTrainedTokenizerFast, asks: Sequence[Ask], answers: Sequence[str]
) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels, each (B, T) int64; only answers have labels."""
    prompts = [f"{USER} {instruction_of(ask)} {ASSISTANT}" for ask in asks]
    texts = [f"{p} {answer} {EOS}" for p, answer in zip(prompts, answers, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    starts = torch.tensor([[len(prompt.split())] for prompt in prompts])
    counts = (torch.arange(ids.shape[1])[None] >= starts) & (mask == 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(counts, IGNORED)}


def make(output_dir: Path, *, instructions: int, pretrain_steps: int, seed: int = 0) -> None:
    """Write data and model to a temporary folder and rename it; an existing folder is kept."""
    if output_dir.exists():
        return
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rng = random.Random(seed)
    rows = make_rows(instructions, rng)
    pairs = [pair_of(number, row, rng) for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), partial / "ultrafeedback.parquet")
    pq.write_table(pa.Table.from_pylist(pairs), partial / "pairs.parquet")
    tokenizer = make_tokenizer()
    make_model(tokenizer, pretrain_steps, seed).save_pretrained(partial / "model")
    tokenizer.save_pretrained(partial / "model")
    os.replace(partial, output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--instructions", type=int, default=800)
    parser.add_argument("--pretrain_steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    make(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
