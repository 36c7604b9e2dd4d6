"""`make bench-gpu`: runs without the packages that a GPU machine may lack, loses one case at most,
goes on where it ended, and measures what its figures are named after."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "compute"
LACKING = ("polars", "datasets", "pydantic", "jsonargparse", "pyarrow", "trl", "peft")
STEPS = "steps 1.5B 512/1024/16"

_BLOCKED_RUN = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {lacking!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of the benchmark, which are not kept: their names are short."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import gpu
    import gpu_cases
    import gpu_goals
    import gpu_sizes
    import gpu_trie

    yield SimpleNamespace(gpu=gpu, cases=gpu_cases, goals=gpu_goals, sizes=gpu_sizes, trie=gpu_trie)
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").exists():
            del sys.modules[name]


def test_engine_losses_and_benchmark_run_without_the_packages_that_a_gpu_machine_may_lack(
    tmp_path: Path,
) -> None:
    argv = [str(FOLDER / "gpu.py"), "--device", "cpu", "--tiny", "--output", str(tmp_path)]
    argv += ["--wheels", str(tmp_path), "--only", STEPS, "head", "sampling", "training"]
    script = _BLOCKED_RUN.format(lacking=set(LACKING), argv=argv)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    ran = {case: status for case, status in last["cases"].items() if status != "not run"}
    assert ran == {STEPS: "done", "head": "done", "sampling": "done", "training": "skipped"}
    lines = (tmp_path / "results-tiny.jsonl").read_text().splitlines()
    results = {result["case"]: result for result in map(json.loads, lines)}
    assert "pyarrow cannot be imported" in results["training"]["reason"]
    figures = results[STEPS]["figures"]
    assert figures["tokens_per_second"] > 0
    assert "datasets cannot be imported" in figures["dpo_skipped"]
    assert "No module named 'trl'" in figures["trie_skipped"]
    # Toy shapes say nothing about the goals.
    assert {goal["verdict"] for goal in last["goals"].values()} == {"unmeasured"}


def _killed(device: str, tiny: bool, report: Any) -> None:
    report(before=1)
    os.kill(os.getpid(), signal.SIGKILL)


def _endless(device: str, tiny: bool, report: Any) -> None:
    report(before=2)
    time.sleep(3600)


def _too_large(device: str, tiny: bool, report: Any) -> None:
    raise torch.OutOfMemoryError("140 GB wanted")


def test_a_case_that_is_killed_or_endless_loses_only_its_later_figures(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {"killed": _killed, "endless": _endless, "too large": _too_large}
    monkeypatch.setattr(bench.cases, "CASES", cases)
    log = tmp_path / "log"
    found = {
        name: bench.gpu.run_case(name, "cpu", True, seconds, log)
        for name, seconds in (("killed", 60.0), ("endless", 1.0), ("too large", 60.0))
    }
    assert {name: result["status"] for name, result in found.items()} == {
        "killed": "crashed",
        "endless": "out of time",
        "too large": "out of memory",
    }
    assert found["killed"]["reason"] == "the process ended with -9"
    assert found["killed"]["figures"] == {"before": 1}
    assert found["endless"]["figures"] == {"before": 2}
    assert found["too large"]["reason"] == "140 GB wanted"


def test_finished_and_skipped_cases_are_not_repeated_and_a_cut_line_is_ignored(
    bench: SimpleNamespace, tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    for case, status in (("a", "done"), ("b", "crashed"), ("c", "skipped"), ("d", "out of time")):
        bench.gpu.append(results, {"case": case, "status": status})
    with results.open("a") as file:
        file.write('{"case": "e", "sta')
    assert list(bench.gpu.finished(results)) == ["a", "c"]
    bench.gpu.append(results, {"case": "e", "status": "done"})
    assert list(bench.gpu.finished(results)) == ["a", "c", "e"]


def test_a_carried_package_that_cannot_be_imported_is_removed(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, wheels = tmp_path / "packages", tmp_path / "wheels"
    for folder in (packages / "datasets", packages / "datasets-4.7.0.dist-info", wheels):
        folder.mkdir(parents=True)
    (wheels / "any.whl").touch()  # installed before: `packages` exists
    (packages / "datasets" / "__init__.py").write_text("import no_such_package\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", str(packages))  # before the installed datasets
    said = bench.gpu.install_wheels(wheels, packages)
    assert "No module named 'no_such_package'" in said
    assert list(packages.iterdir()) == []
    assert sys.path[-1] == str(packages)


def test_goals_are_met_missed_or_unmeasured(bench: SimpleNamespace) -> None:
    first, second = bench.goals.STEP_CASES
    figures = {"speedup_vs_trl_dpo": 3.0, "model_flops_utilisation": 0.5, "no_logits_tensor": True}
    outcomes = {
        first: {"figures": figures},
        second: {"figures": {**figures, "model_flops_utilisation": 0.44}},
        bench.goals.LONG_CASE: {"figures": {"no_square_tensor": None}},
    }
    verdicts = {name: goal["verdict"] for name, goal in bench.goals.goals(outcomes).items()}
    assert verdicts == {
        "speedup_vs_trl_dpo": "met",  # 3.0 >= 3 in both cases
        "speedup_vs_trl_trie": "unmeasured",
        "model_flops_utilisation": "missed",  # 0.44 < 0.45
        "no_logits_tensor": "met",
        "no_square_tensor": "unmeasured",
    }


def test_the_largest_tensor_of_a_step_is_found_and_weights_do_not_count(
    bench: SimpleNamespace,
) -> None:
    model = torch.nn.Linear(8, 300, bias=False)  # 2,400 values; its gradient too
    inputs = torch.randn(7, 8)

    def logits() -> None:
        model(inputs).sum().backward()

    def scores() -> None:
        (inputs @ inputs.T).sum()

    look = bench.sizes.large_tensors
    # 7 rows of 300 logits are 2,100 values: neither below 7 x 7 nor below 7 x 300.
    found = look(logits, model, "cpu", 7, 7, 300)
    assert found["largest_tensor"] == "[7, 300]"
    assert (found["no_square_tensor"], found["no_logits_tensor"]) == (False, False)
    # 7 x 7 scores are 49 values, below 7 x 300.
    found = look(scores, model, "cpu", 7, 7, 300)
    assert (found["no_square_tensor"], found["no_logits_tensor"]) == (False, True)
    assert look(lambda: inputs[:2, :3].sum(), model, "cpu", 7, 7, 300)["no_square_tensor"]


def test_the_trie_packed_loss_of_trl_computes_the_same_group(bench: SimpleNamespace) -> None:
    pytest.importorskip("trl")
    from cases import TINY_CASES
    from ours import Ours

    case = TINY_CASES[0]
    ours = Ours("cpu")
    ours.load(case.to_json())
    expected = ours.reference()["logprob_sum"]
    side = bench.trie.TrieSide(case, "cpu")
    assert float(side.logprobs().detach().sum()) == pytest.approx(expected, abs=1e-2)
    assert side.step()["wall"] > 0
