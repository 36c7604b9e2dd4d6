"""The Python code that the documentation shows runs.

The blocks of a page run in their order, in one namespace and in a folder that holds what pages
name: `data`, a scored dataset; `MODEL`, its reference; `run`, where `data` was trained. `PREPARED`
has the objects of the reader's own that a page uses. Blocks that another test runs are in `RUN_BY`.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.snippets import ROOT, Snippet, all_snippets
from support.training import scored_dataset, trainer_of
from transformers import AutoTokenizer

BLOCKS = all_snippets("python")
# What runs all Python blocks of a page, or those that hold the text: tests, and `make tutorial`.
RUN_BY: dict[str, list[tuple[str, str]]] = {
    "README.md": [("training_steps", "tests/examples/test_loop.py")],
    "docs/howto/serving.md": [("", "tests/train/test_serving.py")],
    "docs/start/from-trl.md": [("", "tests/examples/test_from_others.py")],
    "docs/start/from-verl.md": [("", "tests/examples/test_from_others.py")],
    "docs/start/loop.md": [("", "tests/examples/test_loop.py")],
    "docs/start/tutorial.md": [("", "examples/tutorial/run_notebook.py")],
    "schemas/README.md": [("", "tests/store/test_contract.py")],
}


def run_by(snippet: Snippet) -> str | None:
    """The test file that runs a block, if this one does not."""
    files = [test for text, test in RUN_BY.get(snippet.page, []) if text in snippet.text]
    return files[0] if files else None


HERE = [s for s in BLOCKS if s.not_run is None and run_by(s) is None]
ELSEWHERE = [s for s in BLOCKS if run_by(s) is not None]
NOT_RUN = [s for s in BLOCKS if s.not_run is not None]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The folder in which pages run."""
    folder = tmp_path_factory.mktemp("pages")
    dataset = scored_dataset(folder / "data", tiny_model_dir, 64)
    (folder / "MODEL").symlink_to(tiny_model_dir)
    held_out = {"eval_fraction": 0.2, "eval_strategy": "epoch"}
    trainer_of(tiny_model_dir, dataset, folder / "run", groups_per_step=32, **held_out).train()
    return folder


@pytest.fixture
def here(
    prepared: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder of the page's own as working directory, with what `prepared` holds but `run`."""
    for name in ("data", "MODEL"):
        (tmp_path / name).symlink_to((prepared / name).resolve())
    # The pages that read a run, and train none.
    if any(page in request.node.name for page in ("tuning.md", "run-report.md")):
        (tmp_path / "run").symlink_to(prepared / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return tmp_path


def a_tokenizer(folder: Path) -> dict[str, Any]:
    return {"tokenizer": AutoTokenizer.from_pretrained(folder / "MODEL")}


def flat_tensors(folder: Path) -> dict[str, Any]:
    """`a_tokenizer`, and two groups of two responses."""
    return {
        **a_tokenizer(folder),
        "seq_logprobs": torch.tensor([-1.0, -2.0, -3.0, -1.5], requires_grad=True),
        "ref_logprobs": torch.tensor([-1.5, -1.5, -2.0, -2.0]),
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0]),
        "group_index": torch.tensor([0, 0, 1, 1]),
    }


def judged_policies(folder: Path) -> dict[str, Any]:
    """A trainer that samples answers to held-out prompts, and a result of another policy."""
    (folder / "rewards.py").write_text(
        "def length(prompts, completions, **columns):\n    return [len(c) for c in completions]\n"
    )
    scorer = {"kind": "function", "function": str(folder / "rewards.py") + ":length"}
    trainer = trainer_of(
        folder / "MODEL",
        str(folder / "data"),
        folder / "judged",
        eval_fraction=0.05,
        eval_samples=1,
        eval_max_new_tokens=4,
        eval_reward={"scorers": {"length": scorer}},
    )
    return {"trainer": trainer, "other": trainer.sampled_result(range(16))}


def trials(folder: Path) -> dict[str, Any]:
    """Trainings and answers of the reader's own: functions that answer at once.

    The optimum is at beta 0.1 and rate 1e-3; the judged reward is highest without imitation.
    """
    from gvpo_offline.tune import TrialSettings

    def metrics(beta: float, rate: float) -> dict[str, float]:
        miss = abs(np.log(beta / 0.1)) + abs(np.log(rate / 1e-3))
        return {
            "explained_variance": float(1 / (1 + miss)),
            "loss": float(miss),
            "log_ratio_std": 1.0,
            "likely_log_mass_mean": 0.0,
            "likely_reweighted_reward_mean": float(-miss),
            "likely_reward_mean": 0.0,
        }

    def one_step(rate: float, beta: float) -> dict[str, float]:
        return {**metrics(beta, rate), "explained_variance": 0.5 if rate < 1e-3 else -1.0}

    def my_answers(policy: TrialSettings | str, n: int) -> tuple[Any, Any]:
        random = np.random.default_rng(0)
        shift = 0.0 if isinstance(policy, str) else 1.0 - policy.imitation
        return random.random((12, n)) + shift, np.full((12, n), 0.1)

    return {
        "gap": 1.0,
        "steps": 20,
        "one_step": one_step,
        "trial": lambda beta, rate, steps: metrics(beta, rate),
        "my_training": lambda settings: settings,
        "my_answers": my_answers,
        "my_policy": "untouched",
    }


PREPARED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "README.md": a_tokenizer,
    "docs/start/your-logs.md": flat_tensors,
    "docs/howto/sampled-evaluation.md": judged_policies,
    "docs/howto/tuning.md": trials,
}


@pytest.mark.parametrize("page", sorted({snippet.page for snippet in HERE}))
def test_the_python_of_the_documentation_runs(page: str, here: Path) -> None:
    """In a namespace of its own for each page."""
    names = PREPARED[page](here) if page in PREPARED else {}
    for snippet in HERE:
        if snippet.page == page:
            # Line numbers of a traceback are those of the page.
            code = compile("\n" * (snippet.line - 1) + snippet.text, str(ROOT / page), "exec")
            exec(code, names)


@pytest.mark.parametrize("snippet", ELSEWHERE, ids=lambda snippet: snippet.name)
def test_the_test_that_runs_a_block_names_its_page(snippet: Snippet) -> None:
    test = ROOT / str(run_by(snippet))
    text = test.read_text(encoding="utf-8")
    folder, _, name = snippet.page.rpartition("/")
    assert snippet.page in text or (name in text and f'"{folder}"' in text) or name[:-2] in text


@pytest.mark.parametrize("snippet", NOT_RUN, ids=lambda snippet: snippet.name)
def test_what_an_unrun_block_imports_exists(snippet: Snippet) -> None:
    for node in ast.walk(ast.parse(snippet.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def test_pages_that_are_prepared_have_blocks() -> None:
    assert {snippet.page for snippet in HERE} >= set(PREPARED)
    assert {snippet.page for snippet in ELSEWHERE} == set(RUN_BY)
