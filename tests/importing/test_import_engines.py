"""`import` on every engine: the same bytes, results and errors, and a worker that is killed.

The log is in three files, and the rows of each group in all of them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.importing import ID_COLUMNS, config, id_rows, write_jsonl

from gvpo_offline.errors import ConfigError, DataError, IntegrityError, WorkerError
from gvpo_offline.importing import importer
from gvpo_offline.importing.importer import ImportResult, import_log, import_part
from gvpo_offline.importing.settings import Columns, ImportConfig
from gvpo_offline.store.commit import TaskLog
from gvpo_offline.workers import local
from gvpo_offline.workers.on_ray import connect
from gvpo_offline.workers.process import WorkerProcess
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Task

IDS: dict[str, Any] = {"columns": Columns(**ID_COLUMNS), "shard_bytes": 2048}
ENGINES: dict[str, dict[str, Any]] = {
    "two": {"workers": 2},
    "ray": {"workers": 2, "engine": "ray"},
}


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of some kilobytes has several buckets."""
    monkeypatch.setattr(importer, "_BUCKET_BYTES", 1024)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """The Ray that a run starts on this machine."""
    import ray

    connect(ray, WorkerSettings(engine="ray", workers=2))
    yield
    ray.shutdown()


def files(root: Path) -> dict[str, bytes]:
    """Every file of a dataset's folder, the manifest and the commit records included."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def write_logs(folder: Path, rows: Sequence[dict[str, Any]], n: int = 3) -> list[Path]:
    """The rows in n files, dealt in turn."""
    return [write_jsonl(folder / f"log{i}.jsonl", rows[i::n]) for i in range(n)]


def jobs(logs: Sequence[Path], out: Path, order: Sequence[int], **options: Any) -> ImportResult:
    """Run the jobs of an array in turn, each at most twice; what the last one publishes."""
    n = len(order)
    for number, i in enumerate([*order, *order]):
        found = import_part(config(logs, out, shard=f"{i}/{n}", **options))
        # With one job there is nothing to wait for. Else the last one to read begins to write.
        if found is not None:
            assert number >= min(n, len(logs)) - 1
            assert not found.already_imported
            return found
    raise AssertionError("no job published the dataset")


@pytest.mark.parametrize("engine", [*ENGINES, "shards"])
def test_every_engine_writes_the_same_bytes(
    tmp_path: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    """60 groups of 3, one row broken, one group with a repeated response id: 59 · 3 - 1 left."""
    if engine == "ray":
        request.getfixturevalue("cluster")
    rows = [{**row, "id": f"r{i}"} for i, row in enumerate(id_rows(60))]
    rows[7]["reward"] = "good"
    rows[31]["id"] = rows[30]["id"]
    logs = write_logs(tmp_path, rows)
    columns = Columns(**ID_COLUMNS, response_id="id")
    options = {**IDS, "columns": columns, "on_error": "drop", "rows_per_row_group": 3}
    one = import_log(config(logs, tmp_path / "one", **options))
    out = tmp_path / "out"
    if engine == "shards":
        result = jobs(logs, out, (1, 2, 0), **options)
    else:
        result = import_log(config(logs, out, **ENGINES[engine], **options))
    assert (one.counts["groups"], one.counts["responses"]) == (59, 59 * 3 - 1)
    assert len(one.manifest.groups) == 16
    assert files(out) == files(tmp_path / "one")
    assert "import_report.jsonl" in files(out)
    assert (result.counts, result.details, result.lines()) == (
        *(one.counts, one.details, one.lines()),
    )
    again = import_log(config(logs, out, **ENGINES.get(engine, {}), **options))
    assert again.already_imported


def test_texts_and_templates_in_jobs(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Prompts as chats, rendered and tokenised where a shard is built."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {g} + 1?"}],
            "response": f"It is {g}. {'cat ' * (g % 5)}",
            "reward": 0.1 * (g + r),
            "sampler": f"s{r % 2}",
        }
        for r in range(3)
        for g in range(40)
    ]
    logs = write_logs(tmp_path, rows)
    options = {"tokenizer_name_or_path": str(tiny_tokenizer_dir), "shard_bytes": 4096}
    one = import_log(config(logs, tmp_path / "one", **options))
    two = jobs(logs, tmp_path / "two", (0, 1), **options)
    assert one.counts["groups"] == 40
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert two.lines() == one.lines()


@settings(max_examples=5, deadline=None)
@given(
    n_files=st.integers(1, 4),
    order=st.permutations(range(3)),
    n_groups=st.integers(1, 12),
    shard_bytes=st.sampled_from([300, 2000, 1 << 20]),
)
def test_any_division_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    n_files: int,
    order: list[int],
    n_groups: int,
    shard_bytes: int,
) -> None:
    """Also with more jobs than inputs, more shards than groups, and jobs in any order."""
    folder = tmp_path_factory.mktemp("division")
    logs = write_logs(folder, id_rows(n_groups), n_files)
    options = {**IDS, "shard_bytes": shard_bytes}
    import_log(config(logs, folder / "one", **options))
    jobs(logs, folder / "jobs", order, **options)
    assert files(folder / "jobs") == files(folder / "one")
    shutil.rmtree(folder)


def test_the_error_of_broken_rows_is_that_of_one_process(tmp_path: Path) -> None:
    """Two rules are broken, in all three inputs: one error names both, with the numbers of rows."""
    rows = id_rows(40)
    for number in (4, 5, 6, 50):
        rows[number]["reward"] = "good"
    rows[33]["response_ids"] = []
    logs = write_logs(tmp_path, rows)
    errors = []
    for name, options in (("one", {}), ("two", {"workers": 2})):
        with pytest.raises(DataError) as caught:
            import_log(config(logs, tmp_path / name, **IDS, **options))
        errors.append(caught.value)
        assert not (tmp_path / name).exists()
    with pytest.raises(DataError) as caught:
        import_part(config(logs, tmp_path / "job", shard="0/1", **IDS))
    errors.append(caught.value)
    assert "3 more rows break this rule" in str(errors[0])
    assert "Also" in str(errors[0])
    for error in errors[1:]:
        assert str(error) == str(errors[0])
        assert (error.file, error.row, error.more) == (
            *(errors[0].file, errors[0].row, errors[0].more),
        )
    # What a job has committed may be needed by another job, so it stays.
    assert (tmp_path / "job" / ".spill").exists()


def test_too_many_broken_rows(tmp_path: Path) -> None:
    """Five are broken, two of them in the first input. With a higher limit, all inputs are read
    again: what a job committed that stopped at the limit is not taken for the whole input.
    """
    rows = id_rows(40)
    for number in (3, 6, 1, 4, 5):
        rows[number]["reward"] = "good"
    logs = write_logs(tmp_path, rows)
    options = {**IDS, "on_error": "drop"}
    errors = []
    for name, more in (("one", {}), ("jobs", {"shard": "0/1"})):
        with pytest.raises(DataError, match="at most 1 rows and groups break a rule") as caught:
            import_part(config(logs, tmp_path / name, max_errors=1, **options, **more))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    part = import_part(config(logs, tmp_path / "jobs", max_errors=5, shard="0/1", **options))
    whole = import_log(config(logs, tmp_path / "one", max_errors=5, **options))
    assert part is not None
    assert part.counts == whole.counts
    assert part.counts["rows"] == 120 - 5
    assert files(tmp_path / "jobs") == files(tmp_path / "one")


class _Killed(WorkerProcess):
    """A process that is killed when it is sent the sixth task of all."""

    sent = itertools.count()

    def send(self, request: Any) -> None:
        if isinstance(request, Task) and next(_Killed.sent) == 5:
            self._process.kill()
            self._process.join()
        super().send(request)


def test_a_killed_worker_is_one_error_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three inputs are read first, so the sixth task is a shard."""
    logs = write_logs(tmp_path, id_rows(30))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(local, "WorkerProcess", _Killed)
        patch.setattr(_Killed, "sent", itertools.count())
        with pytest.raises(WorkerError, match=r"of import-.*") as caught:
            import_log(config(logs, out, workers=2, **IDS))
    assert "killed by SIGKILL" in str(caught.value)
    assert multiprocessing.active_children() == []
    assert len(list((out / ".spill").rglob("commits/*/*.json"))) == 3
    # Continued by one process that reads the logs itself, or by jobs that go on from the records.
    again = tmp_path / "again"
    shutil.copytree(out, again)
    import_log(config(logs, again, **IDS))
    import_part(config(logs, out, shard="0/1", **IDS))
    import_log(config(logs, tmp_path / "whole", **IDS))
    assert files(out) == files(again) == files(tmp_path / "whole")


def test_a_job_does_only_its_own_tasks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three inputs job 0/2 reads numbers 0 and 2, and repeats nothing that is committed."""
    logs = write_logs(tmp_path, id_rows(30))
    committed: list[str] = []
    commit = TaskLog.commit
    monkeypatch.setattr(
        TaskLog,
        "commit",
        lambda log, record: (
            committed.append(f"{log.stage[:3]}{record.task}") or commit(log, record)
        ),
    )
    out = tmp_path / "out"
    assert import_part(config(logs, out, shard="0/2", **IDS)) is None
    assert import_part(config(logs, out, shard="0/2", **IDS)) is None
    assert committed == ["map00000", "map00002"]
    assert import_part(config(logs, out, shard="1/2", **IDS)) is None
    assert committed[2:] == ["map00001", *(f"imp{n:05d}" for n in (1, 3, 5, 7))]
    with pytest.raises(ConfigError, match="when all jobs have read"):
        import_log(config(logs, out, shard="1/2", **IDS))
    assert import_part(config(logs, out, shard="0/2", **IDS)) is not None
    assert committed[7:] == [f"imp{n:05d}" for n in (0, 2, 4, 6)]


def test_a_changed_input_or_joined_file_is_read_again(tmp_path: Path) -> None:
    rows = id_rows(20)
    logs = write_logs(tmp_path, [{k: v for k, v in row.items() if k != "reward"} for row in rows])
    scores = tmp_path / "scores.jsonl"
    names = sorted({row["group"] for row in rows})
    joined = {**IDS, "join": str(scores), "on": "group"}
    joined["columns"] = Columns(**{**ID_COLUMNS, "reward": "reward"})
    for round_, value in enumerate((1.0, 2.0)):
        write_jsonl(scores, [{"group": name, "reward": value + round_} for name in names])
        assert import_part(config(logs, tmp_path / "jobs", shard="0/2", **joined)) is None
    jobs(logs, tmp_path / "jobs", (0, 1), **joined)
    import_log(config(logs, tmp_path / "one", **joined))
    assert files(tmp_path / "jobs") == files(tmp_path / "one")


def test_damaged_rows_of_a_map_task(tmp_path: Path) -> None:
    logs = write_logs(tmp_path, id_rows(20))
    out = tmp_path / "out"
    import_part(config(logs, out, shard="0/2", **IDS))
    (first, *_) = sorted(out.rglob("*.rows"))
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    with pytest.raises(IntegrityError, match=r"the rows that a map task wrote") as caught:
        import_part(config(logs, out, shard="1/2", **IDS))
    assert str(first) in str(caught.value)
    assert "Remove the folder .spill" in str(caught.value)
    shutil.rmtree(out / ".spill")
    jobs(logs, out, (0, 1), **IDS)
    import_log(config(logs, tmp_path / "one", **IDS))
    assert files(out) == files(tmp_path / "one")


def test_jobs_share_the_folder_and_nobody_else_writes_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While job 0 reads: job 1 may, an import without `shard` may not, nor the other way round."""
    logs = write_logs(tmp_path, id_rows(20))
    out = tmp_path / "out"
    other: dict[str, ImportConfig] = {
        "job": config(logs, out, shard="1/2", **IDS),
        "whole": config(logs, out, **IDS),
    }
    held = importer.OutputFolder(out, shared=True)
    with held:
        assert import_part(other["job"]) is None
        with pytest.raises(DataError, match="at a time writes to a folder"):
            import_log(other["whole"])
    with importer.OutputFolder(out), pytest.raises(DataError, match="at a time writes"):
        import_part(other["job"])


def test_settings_of_workers_that_contradict_each_other(tmp_path: Path) -> None:
    for options, message in (
        ({"shard": "3/3"}, "shard is i/n"),
        ({"ray_address": "auto"}, "goes with engine: ray"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(tmp_path, tmp_path / "out", **options)
