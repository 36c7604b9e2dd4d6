"""Lines of code per folder of the package, and the modules that one training step executes.

    python benchmarks/structure.py

Counts lines by top-level folder ("room"), then trains a tiny model for one optimizer step with the
command line and records the modules of the package whose functions are called: from the command to
the first update, and within `training_step`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gvpo_offline"
# Eight groups of four responses.
LOG_ROWS: list[dict[str, Any]] = [
    {"prompt": f"question {i}", "response": f"answer {j} {j * i}", "reward": j / 3}
    for i in range(8)
    for j in range(4)
]


def lines_by_room() -> dict[str, int]:
    """Lines of Python per top-level folder or module of the package."""
    lines: Counter[str] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        lines[room] += len(path.read_text(encoding="utf-8").splitlines())
    return dict(lines.most_common())


class Calls:
    """A profiler: modules whose functions are called, in total and within `training_step`."""

    def __init__(self) -> None:
        self.all: set[str] = set()
        self.step: set[str] = set()
        self._depth = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        # Bodies of modules and classes run at import; they are not functions that are called.
        is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED
        if event not in ("call", "return") or "gvpo_offline" not in file or not is_function:
            return
        if name == "training_step":
            self._depth += 1 if event == "call" else -1
        if event == "call" and Path(file).is_relative_to(PACKAGE):
            self.all.add(file)
            if self._depth:
                self.step.add(file)


def prepare(folder: Path) -> None:
    """Make a model, import a dataset and compute its reference log-probs."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny_policy import make_word_model

    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, LOG_ROWS)), encoding="utf-8")
    words = {
        word for row in LOG_ROWS for text in ("prompt", "response") for word in row[text].split()
    }
    make_word_model(folder / "model", sorted(words))
    model, data = str(folder / "model"), str(folder / "data")
    log = str(folder / "log.jsonl")
    command = [sys.executable, "-m", "gvpo_offline.cli"]
    made = ["import", "--inputs", log, "--tokenizer_name_or_path", model, "--output_dir", data]
    scored = ["reference", "--dataset", data, "--model_name_or_path", model, "--use_cpu", "true"]
    for arguments in (made, scored):
        subprocess.run([*command, *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def train_one_step(folder: Path) -> Calls:
    """Run `gvpo-offline train` for one optimizer step in this process."""
    import threading

    from gvpo_offline.cli import main

    calls = Calls()
    sys.setprofile(calls)
    threading.setprofile(calls)
    try:
        main(
            [
                *("train", "--dataset", str(folder / "data")),
                *("--model_name_or_path", str(folder / "model")),
                *("--output_dir", str(folder / "run"), "--max_steps", "1"),
                *("--use_cpu", "true", "--save_strategy", "no"),
            ]
        )
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls


def main() -> None:
    """Print the counts."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "").parse_args()
    sys.path.insert(0, str(ROOT))
    rooms = lines_by_room()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        calls = train_one_step(folder)
    imported = [m for m in sys.modules if m.split(".")[0] == "gvpo_offline"]
    for room, count in rooms.items():
        print(f"{count:7,} {room}")
    print(
        json.dumps(
            {
                "lines": sum(rooms.values()),
                "largest_room": next(iter(rooms)),
                "largest_room_lines": next(iter(rooms.values())),
                "modules": sum(1 for _ in PACKAGE.rglob("*.py")),
                "modules_imported_by_train": len(imported),
                "modules_executed_command_to_update": len(calls.all),
                "modules_executed_in_training_step": len(calls.step),
                "rooms": rooms,
            }
        )
    )


if __name__ == "__main__":
    main()
