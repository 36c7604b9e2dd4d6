"""`workers` of an import: the same bytes and errors as with one process, and what ends a worker."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from support.importing import ID_COLUMNS, config, id_rows, write_jsonl

from gvpo_offline.errors import ConfigError, DataError, WorkerError
from gvpo_offline.importing import builders, importer
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.regroup import SpilledGroups
from gvpo_offline.importing.settings import Columns, ImportConfig
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.spill import power_of_two
from gvpo_offline.workers.process import WorkerProcess

IDS: dict[str, Any] = {"columns": Columns(**ID_COLUMNS)}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs of some kilobytes have several shards, buckets, batches and workers."""
    monkeypatch.setattr(importer, "_BUCKET_BYTES", 2048)
    monkeypatch.setattr(builders, "_RESPONSES_AT_ONCE", 8)
    monkeypatch.setattr(builders, "_WORKER_BYTES", 512)


def files(root: Path) -> dict[str, bytes]:
    """Every file of a dataset's folder, the manifest and the commit records included."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def chat_rows(n_groups: int) -> list[dict[str, Any]]:
    """Three responses a prompt; one of each third prompt is empty, one reward is 0.1 · number."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {g} + 1?"}],
            "response": "" if g % 3 == 0 and r == 2 else f"The answer is {g}. {'cat ' * (g % 5)}",
            "reward": 0.1 * (g + r),
            "sampler": f"s{r % 2}",
        }
        for g in range(n_groups)
        for r in range(3)
    ]


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """Text and chat templates; responses, rows and groups that are dropped and counted."""
    rows: list[dict[str, Any]] = chat_rows(60)
    rows[7]["reward"] = "good"  # broken in the first pass
    rows += [{**row, "response": "long " * 40} for row in rows[30:33]]  # over max_length
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    options: dict[str, Any] = {
        "tokenizer_name_or_path": str(tiny_tokenizer_dir),
        "empty_responses": "drop",
        "on_error": "drop",
        "max_length": 60,
        "shard_bytes": 4096,
        "rows_per_row_group": 7,
    }
    found = {}
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        result = import_log(config(log, out, workers=workers, **options))
        found[workers] = (files(out), result.counts, result.details, result.lines())
    of_one = found[1]
    # Group 10 loses the three long rows, group 2 the broken one, each third group an empty one.
    assert len(result.manifest.groups) == power_of_two(log.stat().st_size, 4096) == 8
    assert of_one[1]["dropped_empty_responses"] == 20
    assert of_one[2]["broken"]["rows"] == 4
    assert of_one[1]["groups_reduced_by_errors"] == 2
    assert found[2] == of_one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "response ids are unique within a group"),
        ({"on_error": "drop", "max_errors": 2}, "at most 2 rows and groups break a rule"),
    ],
)
def test_the_error_is_that_of_one_process(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Broken groups in several batches: the first of them, or all up to the limit, are named."""
    rows = [{**row, "id": f"r{i}"} for i, row in enumerate(id_rows(40))]
    for group in (5, 11, 23, 37):
        rows[3 * group]["id"] = rows[3 * group + 1]["id"]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    columns = Columns(**ID_COLUMNS, response_id="id")
    errors = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        with pytest.raises(DataError, match=message) as caught:
            import_log(config(log, out, columns=columns, workers=workers, **options))
        assert not out.exists()
        errors.append(caught.value)
    one, two = errors
    assert str(two) == str(one)
    assert type(two) is type(one)
    assert (two.file, two.row, two.group, two.more) == (one.file, one.row, one.group, one.more)
    assert multiprocessing.active_children() == []


class _Killed(WorkerProcess):
    """A process that is killed when it is sent its second batch."""

    batches = 0

    def send(self, request: Any) -> None:
        self.batches += isinstance(request, SpilledGroups)
        if self.batches == 2:
            self._process.kill()
            self._process.join()
        super().send(request)


def test_a_killed_worker_is_one_error_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(60))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(builders, "WorkerProcess", _Killed)
        with pytest.raises(WorkerError, match="killed by SIGKILL") as caught:
            import_log(config(log, out, workers=2, **IDS))
    assert "fewer workers" in str(caught.value)
    assert multiprocessing.active_children() == []
    import_log(config(log, out, workers=2, **IDS))
    import_log(config(log, tmp_path / "whole", **IDS))
    assert files(out) == files(tmp_path / "whole")


def test_what_a_worker_raises_at_its_start_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(20))
    wrong = ImportConfig([str(log)], "out", chat_template="template.jinja")
    start = builders.WorkerBuilders
    monkeypatch.setattr(builders, "WorkerBuilders", lambda _, n: start(wrong, n))
    with pytest.raises(ConfigError, match="a chat template needs a tokenizer"):
        import_log(config(log, tmp_path / "out", workers=2, **IDS))
    assert multiprocessing.active_children() == []


def test_an_interrupted_import_continues_with_another_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the second of four shards; no process is left."""
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(60))
    options = {**IDS, "shard_bytes": log.stat().st_size // 4 + 1}
    commit = TaskLog.commit

    def interrupted(self: TaskLog, record: TaskRecord) -> TaskRecord:
        if record.task == "00002":
            raise KeyboardInterrupt
        return commit(self, record)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(TaskLog, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_log(config(log, out, workers=2, **options))
    assert multiprocessing.active_children() == []
    assert len(list(out.rglob("commits/*/*.json"))) == 2
    result = import_log(config(log, out, workers=3, **options))
    assert len(result.manifest.groups) == 4
    import_log(config(log, tmp_path / "whole", **options))
    assert files(out) == files(tmp_path / "whole")


def test_a_small_log_starts_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(4))
    monkeypatch.setattr(builders, "_WORKER_BYTES", log.stat().st_size // 2 + 1)
    monkeypatch.setattr(builders, "WorkerBuilders", None)
    assert import_log(config(log, tmp_path / "out", workers=8, **IDS)).counts["groups"] == 4


def test_there_is_at_least_one_worker(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers"):
        config(tmp_path, tmp_path / "out", workers=0)
