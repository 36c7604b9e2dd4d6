"""Data of commit 849c9a7 (tests/data/before): datasets open, and interrupted stages continue.

The commands run with relative paths in a copy of the folder, as they did when it was made.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvpo_offline import GVPOTrainer, cli, open_dataset
from gvpo_offline.store import import_versions as manifests
from gvpo_offline.version import IMPORT_VERSION

BEFORE = Path(__file__).parents[1] / "data" / "before"
COMMANDS: dict[str, dict[str, Any]] = json.loads((BEFORE / "commands.json").read_text())
COMMANDS["validate"] = {"show_progress": False}
EXPECTED: dict[str, Any] = json.loads((BEFORE / "expected.json").read_text())
Run = Callable[..., None]
# Columns of groups files since 849c9a7.
ADDED = {"prompt_hash", "template_arguments", "response_messages"}

# Rounding of a response's log-prob, by the probabilistic bound of Higham and Mary (SIAM J. Sci.
# Comput. 41, 2019): n roundings in any order err by more than LAMBDA * sqrt(n) * u with a
# probability below 2 exp(-LAMBDA^2 / 2) = 3e-14. A token's log-prob is the end of sums of 8 to 24
# terms (norms, projections, attention over at most 24 positions, the MLP: about 120 terms in all)
# and of one over the vocabulary of 280: n = 400, of values that are at most the largest |log-prob|.
LAMBDA, ROUNDINGS, UNIT = 8.0, 400, 2.0**-24


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command of `commands.json`, in a copy of the folder, to its end."""
    folder = tmp_path / "before"
    shutil.copytree(BEFORE, folder)
    monkeypatch.chdir(folder)

    def command(name: str, **changes: Any) -> None:
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps({**COMMANDS[name], **changes}))
        assert cli.main([name, "--config", str(config)]) == 0

    return command


def files_of(folder: str) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file, which change if it is written again."""
    found = {path: path.stat() for path in Path(folder).rglob("*") if path.is_file()}
    return {
        str(path): (own.st_ino, own.st_mtime_ns)
        for path, own in found.items()
        if ".spill" not in path.parts
    }


def described(folder: str) -> list[dict[str, str]]:
    """Path, hash of bytes and hash of rows of each Parquet file of the newest version."""
    found = []
    for entry in open_dataset(folder, join=()).manifest.files():
        rows = json.dumps(pq.read_table(Path(folder) / entry.path).to_pylist(), default=str)
        digest = hashlib.sha256(rows.encode()).hexdigest()
        found.append({"path": entry.path, "bytes": entry.sha256, "rows": digest})
    return found


def assert_same_files(found: list[dict[str, str]], expected: list[dict[str, str]]) -> None:
    """Files have the same rows, and the same bytes if the same pyarrow version wrote them."""
    assert [own["rows"] for own in found] == [own["rows"] for own in expected]
    if pa.__version__ == EXPECTED["pyarrow"]:
        assert found == expected


def tasks_of(folder: str, stage: str) -> set[str]:
    """The committed tasks of the only stage of this kind."""
    (commits,) = Path(folder, "commits").glob(f"{stage}-*")
    return {path.stem for path in commits.glob("*.json")}


def finishes(run: Run, command: str, folder: str, stage: str, n_tasks: int) -> None:
    """The command runs the tasks that are not committed, and rewrites no other file."""
    before, done = files_of(folder), tasks_of(folder, stage)
    assert len(done) == 1
    run(command)
    after = files_of(folder)
    assert {path: after[path] for path in before} == before
    assert len(tasks_of(folder, stage)) == n_tasks
    run("validate", dataset=folder)


@pytest.mark.parametrize(("folder", "versions"), [("whole", 3), ("merged", 2)])
def test_datasets_open_in_every_version_and_validate(
    run: Run, folder: str, versions: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run("validate", dataset=folder)
    assert_same_files(described(folder), EXPECTED[folder])
    for version in range(1, versions + 1):
        dataset = open_dataset(folder, reward="points", join=("reward",), version=version)
        groups = [g for i in range(dataset.n_row_groups) for g in dataset.groups(i)]
        assert len(groups) == 12
        assert sum(g.group_size for g in groups) == (
            50 if (folder, version) == ("merged", 2) else 42
        )


def test_finished_stages_are_found_done(run: Run) -> None:
    """The same commands write no file, so every identity is unchanged."""
    before = files_of("whole")
    run("reward", dataset="whole")
    run("reference", dataset="whole")
    assert files_of("whole") == before


def test_a_finished_merge_is_found_done(run: Run) -> None:
    """`more` is the import of `more.jsonl` by the same commit."""
    before = files_of("merged")
    run("merge")
    assert files_of("merged") == before


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("whole", "import version 2, which gives other token ids"),
        ("half_import", "is of an earlier import version"),
    ],
)
def test_an_earlier_import_is_left_as_it_is(
    run: Run, folder: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command would give other token ids now, so it neither finishes nor repeats it."""
    before = files_of(folder)
    with pytest.raises(AssertionError):
        run("import", output_dir=folder)
    assert message in capsys.readouterr().err
    assert files_of(folder) == before


def test_a_half_done_sample_goes_on(run: Run) -> None:
    """The sampled ids are kept; the groups files have the columns that were added since."""
    finishes(run, "sample", "half_sample", "sample", 4)
    (step,) = open_dataset("half_sample", join=()).manifest.lineage
    assert step.stage == "sample"
    rows = []
    for entry in open_dataset("half_sample", join=()).manifest.files():
        table = pq.read_table(Path("half_sample") / entry.path)
        assert set(table.column_names) > ADDED
        kept = table.drop_columns(sorted(ADDED)).to_pylist()
        rows.append(hashlib.sha256(json.dumps(kept, default=str).encode()).hexdigest())
    assert rows == [own["rows"] for own in EXPECTED["sample"]]


def test_a_half_done_reward_goes_on(run: Run) -> None:
    finishes(run, "reward", "half_reward", "reward", 4)
    scored = [own for own in EXPECTED["whole"] if not own["path"].startswith("reference")]
    assert_same_files(described("half_reward"), scored)


def test_a_half_done_reference_goes_on(run: Run) -> None:
    """Log-probs equal the earlier ones up to rounding. Each of the two errs by at most the bound at
    the top of this file, summed over the tokens of a response.
    """
    finishes(run, "reference", "half_reference", "reference", 4)
    dataset = open_dataset("half_reference", reward="points")
    groups = [g for i in range(dataset.n_row_groups) for g in dataset.groups(i)]
    for group in groups:
        then = EXPECTED["reference"][group.group_id]
        assert group.ref_seq_logprobs is not None
        for now, own, length in zip(
            group.ref_seq_logprobs, then, group.response_lengths, strict=True
        ):
            assert abs(now - own) <= 2 * rounding(length, abs(own) / length * 2)


def rounding(n_tokens: int, largest: float) -> float:
    """Nats by which rounding moves the log-prob of a response; `largest`: of a token's |log-prob|,
    taken as twice the mean.
    """
    return LAMBDA * math.sqrt(ROUNDINGS * n_tokens) * UNIT * largest


def test_an_earlier_checkpoint_resumes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 3 and 4 have the same groups as in the earlier run, and the same losses.

    A group's loss L = sum w^2 / (2 (k - 1)) has the derivative -beta w_i / (k - 1) by a log-prob,
    and sum |w| <= sqrt(2 k (k - 1) L). So log-probs that are off by d move the mean loss by at most
    beta d sqrt(2 k / (k - 1) L), which is at most beta d sqrt(3 L) for groups of 3 or more. Step
    4's weights differ as well: with adam_epsilon 1, a gradient that is off by e moves a weight by
    at most 2 learning_rate e, and the loss by that times its gradient's norm; e is the relative
    error of a log-prob times the gradient's norm.
    """
    steps: list[list[str]] = []
    training_step = GVPOTrainer.training_step

    def recorded(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        steps.append([group.group_id for group in inputs["share"].groups])
        return training_step(self, model, inputs, *args)

    monkeypatch.setattr(GVPOTrainer, "training_step", recorded)
    run("train", resume_from_checkpoint=True)
    then = EXPECTED["train"]
    assert steps == then["groups"][2:]
    history = json.loads(Path("run", "trainer_state.json").read_text())["log_history"]
    now = [line for line in history if "loss" in line]
    assert [line["step"] for line in now] == [1, 2, 3, 4]
    dataset = open_dataset("whole", reward="points")
    groups = [g for i in range(dataset.n_row_groups) for g in dataset.groups(i)]
    assert max(length for g in groups for length in g.response_lengths) <= 12
    # A token of 280 has a log-prob of about -log 280.
    off = 2 * rounding(12, 2 * math.log(280))
    relative = off / (12 * math.log(280))
    for own, expected in zip(now, then["log"], strict=True):
        norm = expected["grad_norm"]
        bound = COMMANDS["train"]["beta"] * off * math.sqrt(3 * expected["loss"])
        bound += norm * 2 * COMMANDS["train"]["learning_rate"] * relative * norm
        assert abs(own["loss"] - expected["loss"]) <= bound
        assert own["learning_rate"] == expected["learning_rate"]
    losses = [line["loss"] for line in then["log"]]
    assert abs(losses[2] - losses[3]) > bound  # smaller than their difference


def test_a_half_done_search_goes_on(run: Run) -> None:
    """The range test and the first trial are read from their files; the other trials run."""
    before = files_of("tuned")
    assert len(before) == 2
    run("tune")
    after = files_of("tuned")
    assert {path: after[path] for path in before} == before
    trials = [path.name for path in Path("tuned", "tune", "trials").iterdir()]
    assert len(trials) > 2
    # A trial's file name ends in the hash of its settings: no trial ran twice.
    assert len({name.rpartition("-")[0] for name in trials}) == len(trials)
    assert Path("tuned", "tune", "proposed.yaml").exists()


def test_groups_of_an_earlier_import_version_are_warned_of_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run on the dataset of import version 2, and as if that were the present version."""
    assert IMPORT_VERSION == 3
    for present, times in ((3, 1), (2, 0)):
        monkeypatch.setattr(manifests, "IMPORT_VERSION", present)
        caplog.clear()
        run("train", output_dir=f"run-{present}", max_steps=1, save_strategy="no")
        lines = [r.getMessage() for r in caplog.records if "import version" in r.getMessage()]
        assert len(lines) == times
        assert all("import version 2;" in line and "import version 3," in line for line in lines)


def test_the_import_version_is_recorded_and_follows_merged_groups(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Datasets of 849c9a7, which did not record it, are of version 2; a merge keeps both."""
    assert manifests.import_versions(open_dataset("merged", join=()).manifest) == {2}
    run("import", output_dir="new_more", inputs=["more.jsonl"])
    run("import", output_dir="newer")
    assert manifests.import_versions(open_dataset("newer", join=()).manifest) == {3}
    shutil.copytree("half_reward", "older")
    run("merge", dataset="older", add=["new_more"])
    manifest = open_dataset("older", join=()).manifest
    assert manifests.import_versions(manifest) == {2, 3}
    (line,) = manifests.import_warnings(manifest)
    assert "import version 2;" in line
