"""`examples/from_trl_dpo.py`, `from_trl_grpo.py`, `from_verl.py`: the data of another trainer.

TRL is not a dependency: its tests are skipped where it is not installed.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.snippets import ROOT, Snippet, snippets

from gvpo_offline import open_dataset

EXAMPLES = ROOT / "examples"
PAGES = {
    "docs/start/from-trl.md": ("from_trl_dpo.py", "from_trl_grpo.py"),
    "docs/start/from-verl.md": ("from_verl.py",),
}


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An example, imported as it is when it runs: from its own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for loaded in (name, "tiny"):
        sys.modules.pop(loaded, None)
    return importlib.import_module(name)


def run(example: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    argv = [f"{example.__name__}.py", "--output_dir", str(folder), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    example.main()


def gain(output: str) -> tuple[float, float, float]:
    """The rewards before and after training, and the error of the second, as an example prints."""
    found = re.search(r"before ([\d.]+), after ([\d.]+) ± ([\d.]+)", output)
    assert found is not None
    before, after, error = map(float, found.groups())
    return before, after, error


def test_dpo_here_has_the_losses_of_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step by step: the same pairs, beta, rate, schedule and optimizer.

    At the reference each loss is log 2, minus the log of the sigmoid of 0. From step to step the
    loss falls by 3e-3 to 8e-3; another beta or rate of 1% would move that by 3e-5 and more. The
    log-probs are float32 sums of two tokens of about 3 nats, with an error of up to
    4 · 2**-24 · 6 ≈ 1.4e-6; the loss has beta = 0.1 times that, and the updates of 8 steps carry
    the errors of their gradients, which are of that size: in all below 1e-5.
    """
    pytest.importorskip("trl")
    example = module("from_trl_dpo", monkeypatch)
    run(example, tmp_path, monkeypatch, "--trl")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    start = rows.index(["step", "dpo", "DPOTrainer", "gvpo"])
    losses = [[float(value) for value in row[1:]] for row in rows[start + 1 : start + 9]]
    assert len(losses) == 8
    for ours, theirs, _ in losses:
        assert abs(ours - theirs) < 1e-5
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-6)
    # gvpo: rewards 1 and 0 are 1/2 from their mean: (1/4 + 1/4) / 2(k - 1) with k = 2.
    assert losses[0][2] == pytest.approx(0.25, abs=1e-6)
    assert all(b[n] < a[n] for n in (0, 2) for a, b in itertools.pairwise(losses))


def test_grpo_s_completions_train_a_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """15 batches of 8 prompts are 120 groups; the reward of fresh answers rises by 3 errors."""
    pytest.importorskip("trl")
    example = module("from_trl_grpo", monkeypatch)
    run(example, tmp_path, monkeypatch)
    dataset = open_dataset(tmp_path / "data")
    assert 100 <= dataset.n_groups <= 120  # less those with one completion that is not empty
    output = capsys.readouterr().out
    before, after, error = gain(output)
    assert after - before > 3 * error


def test_verl_s_rollouts_train_a_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 prompts at each of 4 steps; the reward of fresh answers rises by 3 errors."""
    example = module("from_verl", monkeypatch)
    run(example, tmp_path, monkeypatch)
    dataset = open_dataset(tmp_path / "data")
    assert dataset.n_groups == 96
    columns = ("group_id", "prompt_token_ids", "response_token_ids", "responses", "metadata")
    group = dataset.groups(0, columns)[0]
    assert group.group_size == 6
    gold = json.loads(str(group.metadata))["gts"]
    assert group.rewards is not None
    assert group.responses is not None
    scores = [example.compute_score("digits", text, gold) for text in group.responses]
    assert group.rewards.tolist() == scores
    before, after, error = gain(capsys.readouterr().out)
    assert after - before > 3 * error


def shown() -> list[tuple[str, Snippet]]:
    return [
        (page, snippet)
        for page in PAGES
        for snippet in snippets(ROOT / page)
        if snippet.language == "python"
    ]


@pytest.mark.parametrize(("page", "snippet"), shown(), ids=lambda value: getattr(value, "name", ""))
def test_the_code_on_the_pages_is_that_of_the_examples(page: str, snippet: Snippet) -> None:
    """Line by line: the tests above run it."""
    sources = "\n".join((EXAMPLES / name).read_text(encoding="utf-8") for name in PAGES[page])
    lines = [line.strip() for line in sources.splitlines()]
    wanted = [line.strip() for line in snippet.text.splitlines() if line.strip()]
    places = [n for n, line in enumerate(lines) if line == wanted[0]]
    bodies = [[line for line in lines[n : n + 200] if line][: len(wanted)] for n in places]
    assert wanted in bodies


def test_the_names_of_trl_on_the_page_are_its_own() -> None:
    """In the tables of from-trl.md, `DPOConfig.name` and `GRPOConfig.name` exist in TRL."""
    trl = pytest.importorskip("trl")
    text = (ROOT / "docs" / "start" / "from-trl.md").read_text(encoding="utf-8")
    for kind in ("DPOConfig", "GRPOConfig"):
        named = re.findall(rf"`{kind}\.(\w+)`", text)
        assert named
        fields = getattr(trl, kind).__dataclass_fields__
        assert [name for name in named if name not in fields] == []
