"""`order`: the groups of a step as the run took them, recomputed from its run file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.builders import make_group
from support.fork_server import ForkServer
from support.training import VOCAB_SIZE, scored_dataset

from gvpo_offline.cli import main
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.writer import publish
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.train.checkpoint import RUN_FILE

STEP = "gvpo_offline.train.trainer:GVPOTrainer.training_step"
SIZES = {"one": 20, "two": 30}
WHERE = "group_size >= 3"
EVAL_FRACTION = 0.3
N_STEPS, GROUPS_PER_STEP = 14, 5
RESUMED_AT = 6  # the checkpoint before the kill at step 8


def groups_named(name: str, n: int) -> list[Any]:
    return [
        make_group(i, seed=n, vocab_size=VOCAB_SIZE, scored=False, group_id=f"{name}-{i:03d}")
        for i in range(n)
    ]


def notes_of(folder: Path) -> dict[int, dict[int, Any]]:
    """The last record of each step (counted from 1), by rank."""
    found: dict[int, dict[int, Any]] = {}
    for path in sorted(folder.glob("notes-*.jsonl"), key=lambda path: path.stat().st_mtime):
        for line in path.read_text().splitlines():
            note = json.loads(line)
            found.setdefault(note["step"] + 1, {})[note["rank"]] = note
    return found


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, server: ForkServer
) -> dict[str, Any]:
    """A mix of two datasets, by weights 3 and 1: on two ranks until it is killed, then on one."""
    root = tmp_path_factory.mktemp("order")
    for name, n in SIZES.items():
        scored_dataset(root / name, tiny_model_dir, groups=groups_named(name, n))
    datasets = [
        {"path": str(root / "one"), "weight": 3.0, "where": WHERE},
        {"path": str(root / "two"), "weight": 1.0, "responses": {"max_responses": 3}},
    ]
    settings = {
        "model_name_or_path": tiny_model_dir,
        "datasets": json.dumps(datasets),
        "output_dir": root / "run",
        "eval_fraction": EVAL_FRACTION,
        "groups_per_step": GROUPS_PER_STEP,
        "max_steps": N_STEPS,
        "max_tokens_per_micro_batch": 60,
        "seed": 7,
        "shuffle_window": 2,
        "learning_rate": 1e-3,
        "save_steps": 3,
        "use_cpu": "true",
        "disable_tqdm": "true",
        "resume_from_checkpoint": "auto",
    }
    argv = ["train", *(str(word) for k, v in settings.items() for word in (f"--{k}", v))]
    kill = [STEP, 8, 0.05]
    for child in server.start_ranks(argv, 2, kill_at=kill, watch=str(root / "two-ranks")):
        assert child.wait() != 0
    status, output = server.run(argv, watch=str(root / "one-rank"))
    assert status == 0, output
    return {
        "root": root,
        "run": root / "run",
        "output": output,
        "two": notes_of(root / "two-ranks"),
        "one": notes_of(root / "one-rank"),
    }


def order(capsys: pytest.CaptureFixture[str], *argv: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["order", *map(str, argv), "--json", "true"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_each_step_has_the_groups_that_the_run_took(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 1 to 6 are of the two ranks before the kill, and the others of the rank that went on:
    the same groups, on the same rank, in the same micro-batches.
    """
    for step in range(1, N_STEPS + 1):
        notes = run["two" if step <= RESUMED_AT else "one"][step]
        found = order(capsys, run["run"], "--step", step)
        assert found["ranks"]["world_size"] == len(notes) == (2 if step <= RESUMED_AT else 1)
        assert len(found["groups"]) == GROUPS_PER_STEP
        for rank, note in notes.items():
            batches: list[list[str]] = [[] for _ in note["batches"]]
            for group in found["groups"]:
                if group["rank"] == rank:
                    batches[group["micro_batch"]].append(group["group_id"])
            assert [sorted(own) for own in batches] == [sorted(own) for own in note["batches"]]


def test_a_group_was_seen_at_the_steps_that_took_it(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """For every stored group; those that no step took are held out, selected away or not drawn."""
    taken: dict[str, list[int]] = {}
    for step in range(1, N_STEPS + 1):
        notes = run["two" if step <= RESUMED_AT else "one"][step]
        for note in notes.values():
            for group_id in note["groups"]:
                taken.setdefault(group_id, []).append(step)
    states = set()
    for name, n in SIZES.items():
        dataset = open_dataset(run["root"] / name)
        chosen = {"where": WHERE} if name == "one" else {}
        held = select(dataset, eval_fraction=EVAL_FRACTION, held_out=True, **chosen)
        assert held is not None
        held_ids = {
            dataset.groups(number)[row].group_id
            for number in range(dataset.n_row_groups)
            for row in held.rows(number)
        }
        for i in range(n):
            group_id = f"{name}-{i:03d}"
            (found,) = order(capsys, run["run"], "--group", group_id)["found"]
            assert [seen["step"] for seen in found["seen"]] == sorted(taken.get(group_id, []))
            state = found["state"].split(":")[0]
            assert (state == "held out") == (group_id in held_ids)
            assert (state == "trained on") == (group_id in taken)
            states.add(state)
    assert {"held out", "trained on", "left out"} <= states


def test_the_outline_says_where_epochs_end(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 14 x 5 draws, epoch e of a dataset of n groups ends with its e x n-th draw."""
    found = order(capsys, run["run"])
    assert (found["steps"], found["draws"]) == (N_STEPS, N_STEPS * GROUPS_PER_STEP)
    drawn: dict[str, list[int]] = {name: [] for name in SIZES}
    for step in range(1, N_STEPS + 1):
        for group in order(capsys, run["run"], "--step", step)["groups"]:
            drawn[group["dataset"]].append(step)
    for own in found["datasets"]:
        steps, n = drawn[own["dataset"]], own["groups"]
        assert own["draws"] == len(steps)
        assert own["epochs_end_at_steps"] == [steps[e - 1] for e in range(n, len(steps) + 1, n)]
        assert own["never_drawn"] == max(0, n - len(steps))
        assert own["stored"] == SIZES[own["dataset"]]
        assert own["held_out"] > 0
    assert [own["first_step"] for own in found["ranks"]] == [1, RESUMED_AT + 1]


def test_a_checkpoint_stands_for_its_run(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The outline of a checkpoint counts the draws of the steps before it."""
    folder = run["run"] / "checkpoint-9"
    found = order(capsys, folder)
    assert (found["steps_done"], found["draws"]) == (9, 9 * GROUPS_PER_STEP)
    own, whole = (order(capsys, place, "--step", 2) for place in (folder, run["run"]))
    assert own["groups"] == whole["groups"]


def test_the_text_names_groups_and_reasons(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["order", str(run["run"])]) == 0
    text = capsys.readouterr().out
    assert "14 steps of 5 groups: 70 draws; seed 7, shuffle_window 2" in text
    assert "eval_fraction 0.3, by prompt" in text
    first = order(capsys, run["run"], "--step", 1)["groups"][0]
    assert main(["order", str(run["run"]), "--step", "1"]) == 0
    assert first["group_id"] in capsys.readouterr().out
    assert main(["order", str(run["run"]), "--group", first["group_id"]]) == 0
    assert f"{first['group_id']} in {first['dataset']}: trained on" in capsys.readouterr().out


def test_a_run_file_of_an_earlier_version_gives_the_same_groups(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It has no part `order`: settings and identity decide the order, and ranks are not known."""
    content = json.loads((run["run"] / RUN_FILE).read_text())
    del content["order"]
    (tmp_path / RUN_FILE).write_text(json.dumps(content))
    for step in (1, 8, N_STEPS):
        old, new = (order(capsys, place, "--step", step) for place in (tmp_path, run["run"]))
        assert old["ranks"] is None
        assert old["groups"] == [
            {name: value for name, value in group.items() if name not in ("rank", "micro_batch")}
            for group in new["groups"]
        ]


def test_the_recorded_version_of_a_changed_dataset_is_read(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A later version without a file of groups, and an earlier run file that names no version."""
    before = order(capsys, run["run"], "--step", 3)["groups"]
    shutil.copytree(run["root"] / "one", tmp_path / "one")
    content = json.loads((run["run"] / RUN_FILE).read_text())
    content["order"]["datasets"][0]["path"] = str(tmp_path / "one")
    content["data"]["datasets"][0]["path"] = str(tmp_path / "one")
    publish(tmp_path / "one", without_first_file)
    (tmp_path / "run").mkdir()
    for without in (False, True):
        if without:
            del content["order"]
        (tmp_path / "run" / RUN_FILE).write_text(json.dumps(content))
        after = order(capsys, tmp_path / "run", "--step", 3)["groups"]
        assert [own["group_id"] for own in after] == [own["group_id"] for own in before]


def without_first_file(newest: Any) -> Any:
    first, *groups = newest.groups
    families = {
        name: [
            own.model_copy(
                update={"files": [f for f in own.files if f.base_sha256 != first.sha256]}
            )
            for own in getattr(newest, name)
        ]
        for name in ("rewards", "references")
    }
    return newest.model_copy(update={"groups": groups, **families})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "15"], "one of the run's steps, 1 to 14"),
        (["--step", "0"], "one of the run's steps, 1 to 14"),
        (["--group", "one-0"], "with which 'one-000', 'one-001'"),
        (["--group", "no such"], "which is the id of none of 50 groups"),
        (["--group", "one-000", "--step", "1"], "either `step` or `group`"),
    ],
)
def test_what_is_not_in_the_run_is_refused(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main(["order", str(run["run"]), *argv]) == 1
    assert message in capsys.readouterr().err


def test_missing_files_are_named(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["order", str(tmp_path)]) == 1
    assert "pass the output_dir of the run" in capsys.readouterr().err.lower()
    content = json.loads((run["run"] / RUN_FILE).read_text())
    content["order"]["datasets"][1]["path"] = str(tmp_path / "gone")
    (tmp_path / RUN_FILE).write_text(json.dumps(content))
    assert main(["order", str(tmp_path), "--step", "1"]) == 1
    message = capsys.readouterr().err
    assert str(tmp_path / "gone") in message
    assert "Restore the dataset there" in message
    (tmp_path / RUN_FILE).write_text("{")
    assert main(["order", str(tmp_path)]) == 1
    assert "restore it from a copy" in capsys.readouterr().err.lower()
