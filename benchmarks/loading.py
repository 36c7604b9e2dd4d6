"""Host memory of loading, sharding, training and saving a model, by rank.

    python benchmarks/loading.py [--ranks 2 4]

A Llama of 110M parameters is saved in bfloat16, as most published models are, and trained in
float32 for one step on CPU processes (gloo), with DDP and with FSDP2; then it scores a reference
with FSDP2. A thread of each rank samples its anonymous memory (`RssAnon`: what the process owns,
without the pages of files that all processes of a machine share) every 2 ms.

Prints one JSON object on the last line: for each way and number of ranks, by phase, the largest
growth of a rank's anonymous memory since before the model was loaded, and the sum over the ranks of
the growth of their proportional shares of all pages (`Pss`) by loading; both as multiples of the
model's size in float32. Stored in bfloat16, it has half of that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
VOCABULARY = 32_000
# The first argument of a rank; then its folder, and the words of the command.
WORK = ["--work"]
SHARDED = {"fsdp": "true", "fsdp_config": json.dumps({"state_dict_type": "SHARDED_STATE_DICT"})}
WAYS: dict[str, dict[str, str]] = {
    "ddp": {},
    "ddp, as stored": {"dtype": "bfloat16"},
    "fsdp2": SHARDED,
    "fsdp2, bf16": {**SHARDED, "bf16": "true"},
}
REFERENCE = "reference"
# mallopt: blocks of more bytes than this are returned to the system when they are freed.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _RETURNED = -1, -3, 1 << 16


class Sampler:
    """The largest anonymous memory of this process in each phase, bytes."""

    def __init__(self) -> None:
        self.start = anonymous()
        self.peaks: dict[str, int] = {}
        self.phase = "load"
        self.shared = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.note()
            time.sleep(0.002)

    def note(self) -> None:
        """Sample now."""
        grown = anonymous() - self.start
        self.peaks[self.phase] = max(grown, self.peaks.get(self.phase, 0))

    def begin(self, phase: str) -> None:
        """The end of a phase and the start of another."""
        self.note()
        self.phase = phase

    def save(self, file: Path) -> None:
        """Write the figures."""
        self.note()
        file.write_text(json.dumps({"peaks": self.peaks, "pss": self.shared}), encoding="utf-8")


def anonymous() -> int:
    """Anonymous memory of this process, bytes."""
    return _kilobytes("/proc/self/status", "RssAnon") << 10


def proportional() -> int:
    """This process's share of all its pages, bytes; a page of n processes counts as 1/n."""
    return _kilobytes("/proc/self/smaps_rollup", "Pss") << 10


def _kilobytes(file: str, name: str) -> int:
    for line in Path(file).read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise ValueError(f"{file} has no {name}")


def work(argv: list[str], folder: Path) -> None:
    """A rank: runs a command and writes the figures to `folder`."""
    import ctypes
    from importlib import import_module

    from gvpo_offline.cli import main
    from gvpo_offline.train.trainer import GVPOTrainer

    for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(option, _RETURNED)
    train, ranks, score = (
        import_module(f"gvpo_offline.{name}")
        for name in ("commands.train", "reference.ranks", "reference.score")
    )
    sampler = Sampler()
    loads = train.load_policy

    def loaded(*args: Any, **kwargs: Any) -> Any:
        _meet()
        before = proportional()
        _meet()
        model = loads(*args, **kwargs)
        for weight in model.parameters():
            weight.detach().sum()  # reads every page
        _meet()
        sampler.shared = proportional() - before
        sampler.begin("check")
        return model

    def around(phase: str, own: Callable[..., Any], then: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            sampler.begin(phase)
            found = own(*args, **kwargs)
            sampler.begin(then)
            return found

        return wrapped

    trainer: Any = GVPOTrainer
    for module in (train, score):
        vars(module)["load_policy"] = loaded
    shards = ranks.shard_model
    vars(ranks)["shard_model"] = around("shard", shards, "score")
    trainer._prepare_for_training = around("shard", trainer._prepare_for_training, "train")
    trainer.save_model = around("save", trainer.save_model, "end")
    status = main(argv)
    sampler.save(folder / f"rank{os.environ['RANK']}.json")
    sys.exit(status)


def _meet() -> None:
    """All ranks are here."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def run_ranks(n: int, argv: list[str], root: Path) -> list[dict[str, Any]]:
    """Run a command on n ranks; what each wrote."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(n):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(n),
            "LOCAL_WORLD_SIZE": str(n),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        line = [sys.executable, __file__, *WORK, str(root), *argv]
        processes.append(
            subprocess.Popen(
                line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    for process in processes:
        output, _ = process.communicate()
        if process.returncode:
            sys.exit(output)
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(n)]


def write_model(folder: Path, tiny: Path) -> int:
    """A bfloat16 Llama with random weights; returns its number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def command_of(way: str, n: int, out: Path, folder: Path, data: Path) -> list[str]:
    """The words of a training run of one step on n ranks, or of the reference stage."""
    settings = {"model_name_or_path": folder, "dataset": data, "use_cpu": "true"}
    if way == REFERENCE:
        settings["dataset"] = shutil.copytree(data, out)  # a scored one is left as it is
        settings |= {"fsdp": "true", "max_tokens_per_micro_batch": "512", "show_progress": "false"}
    else:
        settings |= {
            "output_dir": out,
            "max_steps": "1",
            "groups_per_step": str(n),
            "learning_rate": "1e-6",
            "reference_check": "off",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": "true",
            **WAYS[way],
        }
    words = (str(w) for name, value in settings.items() for w in (f"--{name}", value))
    return ["reference" if way == REFERENCE else "train", *words]


def largest(found: list[dict[str, Any]], n_bytes: int) -> dict[str, Any]:
    """Of the figures of all ranks: anonymous memory by phase, and loaded pages, per `n_bytes`."""
    peaks = {
        phase: round(max(own["peaks"].get(phase, 0) for own in found) / n_bytes, 3)
        for phase in found[0]["peaks"]
    }
    loaded = round(sum(own["pss"] for own in found) / n_bytes, 3)
    return {"anonymous_of_a_rank": peaks, "pss_of_all_loaded": loaded}


def main() -> None:
    """Run all ways; prints a JSON object."""
    if sys.argv[1:2] == WORK:
        work(sys.argv[3:], Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ways", nargs="+", default=[*WAYS, REFERENCE], choices=[*WAYS, REFERENCE])
    given = parser.parse_args()
    from support.tiny_policy import make_tiny_model, train_tokenizer
    from support.training import scored_dataset

    with tempfile.TemporaryDirectory(prefix="gvpo-loading-") as scratch:
        root = Path(scratch)
        tiny = make_tiny_model(root / "tiny", train_tokenizer(root / "tokenizer"))
        data = Path(scored_dataset(root / "data", tiny, 8).root)
        n_bytes = 4 * write_model(root / "model", tiny)
        report: dict[str, Any] = {"model_mb": n_bytes / 1e6}
        for way in given.ways:
            for n in given.ranks:
                out = root / f"{way}-{n}".replace(", ", "-")
                out.mkdir()
                argv = command_of(way, n, out / "run", root / "model", data)
                label = f"{way} on {n} ranks"
                report[label] = largest(run_ranks(n, argv, out), n_bytes)
                print(label, report[label], file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
