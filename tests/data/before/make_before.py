"""Makes the files of this folder with the code of commit 849c9a7. Run it there, once:

    git worktree add /tmp/before 849c9a7
    cd /tmp/before
    PYTHONPATH=. OMP_NUM_THREADS=1 python .../tests/data/before/make_before.py

Every command runs with this folder as the working folder and relative paths, so that no file holds
a path of the machine. A command that is to be half done runs in a process of its own, which exits
without any clean-up after its first committed task.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMIT = "849c9a7"
HERE = Path(__file__).resolve().parent
COMMANDS: dict[str, dict[str, Any]] = json.loads((HERE / "commands.json").read_text())
HALF_DONE = {
    "import": "half_import",
    "sample": "half_sample",
    "reward": "half_reward",
    "reference": "half_reference",
}


def run(command: str, **changes: Any) -> None:
    """Run a command of gvpo-offline in this process."""
    from gvpo_offline import cli

    settings = {**COMMANDS[command], **changes}
    config = HERE / ".command.json"
    config.write_text(json.dumps(settings))
    try:
        status = cli.main([command, "--config", str(config)])
    finally:
        config.unlink()
    assert status == 0, (command, status)


def run_killed(command: str, **changes: Any) -> None:
    """Run a command in a process that ends at once after its first committed task."""
    arguments = [sys.executable, __file__, "killed", command, json.dumps(changes)]
    status = subprocess.run(arguments, check=False).returncode
    assert status == 9, (command, status)


def killed(command: str, changes: dict[str, Any]) -> None:
    """What `run_killed` runs."""
    from gvpo_offline.store import commit
    from gvpo_offline.tune import trials

    write_record = commit.TaskLog.commit

    def committed(log: Any, record: Any) -> Any:
        found = write_record(log, record)
        if record.entries() and not record.stage.startswith("prompts-"):
            os._exit(9)
        return found

    commit.TaskLog.commit = committed  # type: ignore[method-assign]
    if command == "tune":  # after the range run and the first trial
        create_only, calls = trials.create_only, []

        def created(path: Path, text: str) -> bool:
            made = create_only(path, text)
            calls.append(path)
            if len(calls) == 2:
                os._exit(9)
            return made

        trials.create_only = created  # type: ignore[attr-defined]
    run(command, **changes)


def write_identities() -> None:
    """The hashes of the settings in `identities.json`, as stages and runs made them then."""
    from dataclasses import asdict

    from pydantic import TypeAdapter

    from gvpo_offline.hashing import sha256_json
    from gvpo_offline.importing.settings import Columns, ImportConfig
    from gvpo_offline.merging.settings import CompactConfig, MergeConfig
    from gvpo_offline.rewards.kinds import ScorerSettings
    from gvpo_offline.rewards.scorer import settings_of
    from gvpo_offline.sampling.settings import sampler_settings
    from gvpo_offline.train.objective import Objective

    settings = json.loads((HERE / "identities.json").read_text())["settings"]
    columns = Columns(**settings["import"]["columns"])
    found: dict[str, Any] = {
        "import": asdict(ImportConfig(**{**settings["import"], "columns": columns})),
        "merge": asdict(MergeConfig(**settings["merge"])),
        "compact": asdict(CompactConfig(**settings["compact"])),
        "objective": asdict(Objective(**settings["objective"])),
    }
    hashes: dict[str, Any] = {name: sha256_json(own) for name, own in found.items()}
    hashes["sampler"] = {
        kind: sha256_json(sampler_settings("s", {"kind": kind, **own}).identity())
        for kind, own in settings["sampler"].items()
    }
    scorers: Any = TypeAdapter(ScorerSettings)
    hashes["scorer"] = {
        kind: sha256_json(settings_of(scorers.validate_python({"kind": kind, **own})))
        for kind, own in settings["scorer"].items()
    }
    text = json.dumps({"settings": settings, "sha256": hashes}, indent=1)
    (HERE / "identities.json").write_text(text + "\n")


def write_inputs() -> None:
    """The logs, the prompts, and a tokenizer with a model of about 3,000 weights."""
    rows, more, prompts = [], [], []
    for n in range(12):
        a, b = n + 2, 3 * n % 7
        prompt = f"What is {a} + {b}?"
        answers = [f"{a + b}", f"The sum is {a + b}.", f"{a + b + 1}", f"It may be {a * b + 1}"]
        for i, text in enumerate(answers[: 3 + n % 2]):
            reward = float(text.rstrip(".").endswith(str(a + b))) + i / 8
            row = {"prompt": prompt, "response": text, "reward": reward, "answer": str(a + b)}
            rows.append({**row, "sampler": "ab"[i % 2]})
        if n < 4:
            row = {"prompt": prompt, "answer": str(a + b), "sampler": "c"}
            more.append({**row, "response": f"{a} + {b} = {a + b}", "reward": 1.5})
            more.append({**row, "response": f"{a} + {b} = {a - b}", "reward": -0.5})
        if n < 8:
            prompts.append({"prompt": prompt, "answer": str(a + b)})
    for name, lines in (("log", rows), ("more", more), ("prompts", prompts)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (HERE / f"{name}.jsonl").write_text(text)
    make_model([row["prompt"] + row["response"] for row in rows + more])


def make_model(texts: list[str]) -> None:
    """A byte-level BPE, and a Qwen3 of one layer with hidden size 8 and seeded random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.save_pretrained(HERE / "model")
    config = Qwen3Config(
        vocab_size=len(fast),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(HERE / "model")


def write_results() -> None:
    """A batch API's results: what a first `sample` without any asks for, answered."""
    from gvpo_offline import cli

    sampler = {**COMMANDS["sample"]["samplers"]["batch"], "results": []}
    settings = {**COMMANDS["sample"], "output_dir": "asked", "samplers": {"batch": sampler}}
    config = HERE / ".command.json"
    config.write_text(json.dumps(settings))
    cli.main(["sample", "--config", str(config)])  # ends with an error: responses are missing
    config.unlink()
    requests = next((HERE / "asked" / "batches" / "batch").glob("*.jsonl"))
    lines = []
    for number, line in enumerate(requests.read_text().splitlines()):
        asked = json.loads(line)
        choice = {"index": 0, "text": f"The sum is {number}.", "finish_reason": "stop"}
        body = {"id": f"r{number}", "model": "adder", "choices": [choice]}
        response = {"status_code": 200, "body": body}
        lines.append({"custom_id": asked["custom_id"], "response": response, "error": None})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (HERE / "results.jsonl").write_text(text)
    shutil.rmtree(HERE / "asked")


def described(folder: Path) -> list[dict[str, str]]:
    """Each Parquet file of a dataset's newest version: the hash of its bytes and of its rows."""
    import pyarrow.parquet as pq

    from gvpo_offline.store.manifest import load_manifest

    found = []
    for entry in load_manifest(folder).files():
        rows = json.dumps(pq.read_table(folder / entry.path).to_pylist(), default=str)
        digest = hashlib.sha256(rows.encode()).hexdigest()
        found.append({"path": entry.path, "bytes": entry.sha256, "rows": digest})
    return found


def trained() -> dict[str, Any]:
    """Train without an interruption, and leave `run/` as it was after step 2."""
    from gvpo_offline.train.trainer import GVPOTrainer

    steps: list[list[str]] = []
    training_step = GVPOTrainer.training_step

    def recorded(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        steps.append([group.group_id for group in inputs["share"].groups])
        return training_step(self, model, inputs, *args)

    GVPOTrainer.training_step = recorded  # type: ignore[method-assign]
    run("train")
    GVPOTrainer.training_step = training_step  # type: ignore[method-assign]
    state = json.loads((HERE / "run" / "trainer_state.json").read_text())
    for path in (HERE / "run").iterdir():
        if path.name == "checkpoint-4":
            shutil.rmtree(path)
        elif path.name not in ("checkpoint-2", "gvpo_run.json"):
            path.unlink()
    names = ("step", "loss", "grad_norm", "learning_rate", "explained_variance")
    log = [{n: line[n] for n in names if n in line} for line in state["log_history"]]
    return {"groups": steps, "log": [line for line in log if "loss" in line]}


def reference_sums(folder: Path) -> dict[str, list[float]]:
    """The reference log-probs of each group's responses."""
    from gvpo_offline import open_dataset

    dataset = open_dataset(folder, reward="points")
    groups = [g for i in range(dataset.n_row_groups) for g in dataset.groups(i)]
    return {g.group_id: [float(x) for x in g.ref_seq_logprobs] for g in groups}


def main() -> None:
    """Write everything anew."""
    import pyarrow

    os.chdir(HERE)
    kept = {"commands.json", "identities.json", "make_before.py", "rewards.py", "README.md"}
    for path in HERE.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_identities()
    write_inputs()
    write_results()
    expected: dict[str, Any] = {"commit": COMMIT, "pyarrow": pyarrow.__version__}

    run("import", output_dir="whole")
    for name in ("half_reward", "half_reference"):
        shutil.copytree("whole", name)
    run("reward", dataset="whole")
    run("reference", dataset="whole")
    expected["whole"] = described(HERE / "whole")
    expected["reference"] = reference_sums(HERE / "whole")

    run("import", output_dir="merged")
    run("import", output_dir="more", inputs=["more.jsonl"])
    run("merge")
    shutil.rmtree("more")
    expected["merged"] = described(HERE / "merged")

    run("sample", output_dir="sampled")
    expected["sample"] = described(HERE / "sampled")
    shutil.rmtree("sampled")

    for command, folder in HALF_DONE.items():
        run_killed(command)
        print(folder, sorted(str(p) for p in Path(folder).rglob("*.json")))

    expected["train"] = trained()
    run("tune", output_dir="all_tuned")
    proposed = json.loads(Path("all_tuned/tune/tune.json").read_text())
    names = sorted(path.name for path in Path("all_tuned/tune/trials").iterdir())
    expected["tune"] = {"rate": proposed["learning_rate"], "trials": names}
    shutil.rmtree("all_tuned")
    run_killed("tune")
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["killed"]:
        os.chdir(HERE)
        killed(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
