"""`import` with `singletons: keep`: prompts with one response are stored apart, and nothing trains
on them; more samples and other logs complete them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.builders import differences
from support.importing import (
    ALL_COLUMNS,
    ID_COLUMNS,
    config,
    content,
    id_rows,
    read_groups,
    write_jsonl,
)
from support.merging import import_rows
from support.remote_servers import FolderServer, serving
from support.sampling import config as sample_config
from support.sampling import local

from gvpo_offline import RemoteSettings
from gvpo_offline.cli import main
from gvpo_offline.errors import ConfigError, DataError, IntegrityError, StorageError
from gvpo_offline.group import Group
from gvpo_offline.importing import importer
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns
from gvpo_offline.info.dataset import dataset_info
from gvpo_offline.info.text import info_lines, overview_lines
from gvpo_offline.merging.settings import MergeConfig
from gvpo_offline.merging.stages import merge
from gvpo_offline.sampling.run import run_sample
from gvpo_offline.store.adopt import adopt_parquet, open_for_training
from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.incomplete import incomplete_dataset, write_incomplete
from gvpo_offline.store.manifest import (
    IncompleteGroups,
    Manifest,
    dump_manifest,
    load_manifest,
    manifest_path,
)
from gvpo_offline.store.sidecar_choice import choose_reward_families
from gvpo_offline.store.validate import Validation, validate
from gvpo_offline.store.writer import publish

Rows = list[dict[str, Any]]


def checked(root: Path | str, **options: Any) -> Validation:
    """Validate a dataset without progress bars."""
    return validate(root, lambda numbers, label: numbers, **options)


def waiting(root: Path) -> list[Group]:
    """The incomplete groups of a dataset with all columns, in order."""
    dataset = incomplete_dataset(root, load_manifest(root))
    assert dataset is not None
    columns = (*ALL_COLUMNS, "components")
    return [g for i in range(dataset.n_row_groups) for g in dataset.groups(i, columns)]


def mixed_rows(n_groups: int) -> Rows:
    """Rows of groups of 2, and of as many prompts with 1 response, mixed."""
    rows = id_rows(2 * n_groups, k=2)
    return [row for n, row in enumerate(rows) if n % 4 != 1]


def join(dataset: Path, *add: Path, **options: Any) -> Manifest:
    """Merge, and check every byte of the result."""
    names = [str(path) for path in add]
    merge(MergeConfig(dataset=str(dataset), add=names, show_progress=False, **options))
    found = checked(dataset).manifest
    assert found is not None
    return found


# ---- import ----


def test_kept_apart_from_the_groups(tmp_path: Path) -> None:
    """`keep` gives the groups that `drop` gives, byte for byte, and the dropped ones beside them.

    40 groups of 2 responses and 40 prompts with 1, in 8 shards, 3 rows in a row group.
    """
    options: dict[str, Any] = {"shard_bytes": 2000, "rows_per_row_group": 3}
    rows = mixed_rows(40)
    dropped = import_rows(tmp_path / "drop", rows, singletons="drop", **options)
    manifest = import_rows(tmp_path / "keep", rows, singletons="keep", **options)
    assert len(manifest.groups) > 3
    assert content(manifest) == content(dropped)
    assert (manifest.n_groups, manifest.n_incomplete) == (40, 40)
    found = waiting(tmp_path / "keep")
    wanted = import_rows(tmp_path / "all", [r for r in rows for _ in range(2)])
    assert wanted.n_groups == 80
    doubled = {group.group_id: group for group in read_groups(tmp_path / "all")}
    for group in found:
        twice = doubled[group.group_id]
        assert group.group_size == 1
        assert np.array_equal(group.prompt_token_ids, twice.prompt_token_ids)
        assert np.array_equal(group.response_token_ids[0], twice.response_token_ids[0])
        assert (group.samplers, group.source) == (twice.samplers[:1], twice.source)
        assert group.rewards is not None
        assert twice.rewards is not None
        assert group.rewards.tolist() == twice.rewards.tolist()[:1]
    counts = manifest.lineage[0].counts
    assert (counts["rows"], counts["groups"], counts["incomplete_groups"]) == (120, 40, 40)
    assert (counts["responses"], counts["dropped_singletons"]) == (80, 0)
    assert checked(tmp_path / "keep").survey.n_groups == 40
    assert manifest.incomplete is not None
    assert all(max(file.row_groups) <= 3 for file in manifest.incomplete.files)


def test_a_manifest_without_them_does_not_name_them(tmp_path: Path) -> None:
    """So that manifests without incomplete groups keep their bytes, and their counts too."""
    manifest = import_rows(tmp_path / "data", id_rows(4), singletons="keep")
    assert manifest.incomplete is None
    assert "incomplete" not in dump_manifest(manifest)
    found = dataset_info(tmp_path / "data")
    assert "incomplete" not in found.as_dict()
    assert "incomplete" not in "\n".join([*info_lines(found), *overview_lines([found, found])])
    assert not (tmp_path / "data" / "incomplete").exists()
    root = tmp_path / "some"
    import_rows(root, mixed_rows(2), singletons="keep")
    assert load_manifest(root).incomplete is not None
    assert '"incomplete"' in manifest_path(root, 1).read_text()


def test_the_same_import_again_and_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted import goes on with its committed shards; one of bad data leaves nothing."""
    options: dict[str, Any] = {"shard_bytes": 2000, "singletons": "keep"}
    rows, written = mixed_rows(30), []

    def second_fails(*args: Any, **further: Any) -> TaskRecord:
        written.append(1)
        if len(written) == 3:
            raise StorageError("there must be room on the disk", received="none")
        return write_shard(*args, **further)

    write_shard = importer.write_shard
    whole = import_rows(tmp_path / "whole", rows, **options)
    with monkeypatch.context() as patched:
        patched.setattr(importer, "write_shard", second_fails)
        with pytest.raises(StorageError):
            import_rows(tmp_path / "data", rows, **options)
    stray = tmp_path / "data" / "incomplete" / "00007-0123456789ab.parquet"
    stray.write_bytes(b"of a task that was not committed")
    manifest = import_rows(tmp_path / "data", rows, **options)
    assert [e.sha256 for e in manifest.files()] == [e.sha256 for e in whole.files()]
    assert not stray.exists()
    assert not (tmp_path / "data" / ".spill").exists()
    again = import_log(config(tmp_path / "data.jsonl", tmp_path / "other", **_ids(), **options))
    assert not again.already_imported
    again = import_log(config(tmp_path / "data.jsonl", tmp_path / "other", **_ids(), **options))
    assert again.already_imported
    assert "30 incomplete groups: prompts with a single response" in "\n".join(again.lines())
    bad = [*rows, {**rows[0], "group": "bad", "reward": float("nan")}]
    with pytest.raises(DataError):
        import_rows(tmp_path / "bad", bad, **options)
    assert not (tmp_path / "bad").exists()


def _ids() -> dict[str, Any]:
    return {"columns": Columns(**ID_COLUMNS)}


def test_a_prompt_without_responses_is_dropped_and_counted(tmp_path: Path) -> None:
    """Two responses, one, and one that is empty and dropped."""
    rows = [
        {"prompt_ids": [1, n], "response_ids": ids, "group": f"g{n}", "reward": 1.0, "sampler": "s"}
        for n, ids in ((2, [5]), (2, [6]), (1, [7]), (0, []))
    ]
    options = {"singletons": "keep", "empty_responses": "drop"}
    manifest = import_rows(tmp_path / "data", rows, **options)
    assert (manifest.n_groups, manifest.n_incomplete) == (1, 1)
    assert manifest.lineage[0].counts["dropped_groups_without_responses"] == 1


def test_the_default_names_all_remedies(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"singletons: drop.*singletons: keep"):
        import_rows(tmp_path / "data", mixed_rows(1))


# ---- what reads datasets ----


def test_a_dataset_of_them_alone_is_not_trained_on(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is published and described; what needs groups says what to do, and `validate` fails it."""
    rows = [row for row in id_rows(5, k=2) if row["sampler"] == "s0"]
    manifest = import_rows(tmp_path / "data", rows, singletons="keep")
    assert (manifest.n_groups, manifest.n_incomplete) == (0, 5)
    data, model = str(tmp_path / "data"), ["--model_name_or_path", str(tiny_model_dir)]
    assert main(["validate", "--dataset", data, "--show_progress", "false"]) == 1
    told = capsys.readouterr().out
    assert "5 incomplete groups" in told
    assert "fail: 1 error" in told
    assert main(["ls", data]) == 0
    assert "5 prompts with one response, with reward reward@1" in capsys.readouterr().out
    assert main(["ls", data, "--content", "true"]) == 0
    scorer = "{a: {kind: exact_match, answer: x}}"
    refused = [
        ["train", *model, "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"],
        ["reference", *model, "--use_cpu", "true"],
        ["evaluate", *model, "--beta", "0.1", "--use_cpu", "true"],
        ["reward", "--name", "r", "--scorers", scorer],
    ]
    for command, *flags in refused:
        capsys.readouterr()
        assert main([command, "--dataset", data, *flags]) == 1, command
        said = capsys.readouterr().err
        assert "5 incomplete groups, each a prompt with 1 response" in said, command
        assert "gvpo-offline merge" in said, command
    with pytest.raises(DataError, match="at least 2 responses"):
        open_for_training(data)
    assert [step.stage for step in load_manifest(tmp_path / "data").lineage] == ["import"]


def test_what_ls_says(tmp_path: Path) -> None:
    rows = mixed_rows(3)
    import_rows(tmp_path / "data", rows, singletons="keep")
    import_rows(tmp_path / "plain", id_rows(2))
    info = dataset_info(tmp_path / "data", content=True)
    found = info.as_dict()
    assert (found["groups"], found["responses"]) == (3, 6)
    assert found["incomplete"]["groups"] == 3
    assert found["incomplete"]["reward"] == "reward@1"
    assert found["incomplete"]["size"]["files"] == 1
    assert found["total"]["files"] == 3  # groups, rewards, incomplete groups
    assert found["versions"][0]["added"] == ["groups", "reward reward@1", "incomplete groups"]
    assert sum(found["content"]["group_sizes"].values()) == 3
    text = "\n".join(info_lines(info))
    assert "3 prompts with one response, with reward reward@1; 1 file" in text
    table = overview_lines([info, dataset_info(tmp_path / "plain")])
    assert table[0].endswith("incomplete")
    assert [line.split()[-1] for line in table[1:]] == ["3", "none"]


def test_validate_reads_them(tmp_path: Path) -> None:
    """A damaged file, a missing one, and one with two responses in a row."""
    root = tmp_path / "data"
    manifest = import_rows(root, mixed_rows(3), singletons="keep")
    assert checked(root).n_files == 3
    assert manifest.incomplete is not None
    (entry,) = manifest.incomplete.files
    good = (root / entry.path).read_bytes()
    (root / entry.path).write_bytes(good[:-20] + b"x" + good[-19:])
    with pytest.raises(IntegrityError):
        checked(root)
    (root / entry.path).unlink()
    with pytest.raises(IntegrityError, match="every file that the manifest names exists"):
        checked(root)
    (root / entry.path).write_bytes(good)
    pairs = root / manifest.groups[0].path
    table = pq.read_table(pairs)
    # The groups of two responses, as if a program had written them there.
    pq.write_table(table, root / "incomplete" / "wrong.parquet")
    wrong = adopt_parquet([root / "incomplete" / "wrong.parquet"]).manifest.groups[0]
    wrong = wrong.model_copy(update={"path": "incomplete/wrong.parquet"})

    def build(newest: Manifest | None) -> Manifest:
        assert newest is not None
        return newest.model_copy(update={"incomplete": IncompleteGroups(files=[wrong])})

    publish(root, build)
    with pytest.raises(DataError, match="an incomplete group has exactly 1 response"):
        checked(root)


def test_only_groups_of_one_response_are_written(tmp_path: Path) -> None:
    import_rows(tmp_path / "data", id_rows(1))
    with pytest.raises(DataError, match="exactly 1 response"):
        write_incomplete(tmp_path, "00000", read_groups(tmp_path / "data"), reward=True)


def test_at_a_url(tmp_path: Path) -> None:
    """Over http the incomplete groups are those of the folder."""
    import_rows(tmp_path / "data", mixed_rows(3), singletons="keep")
    with serving(FolderServer(tmp_path)) as server:
        remote = RemoteSettings(cache_dir=str(tmp_path / "cache"))
        found = checked(f"{server.url}/data", remote=remote)
        assert found.manifest == load_manifest(tmp_path / "data")
        assert found.n_files == 3


# ---- formats that hold one response to each prompt ----


def request(key: str, text: str) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    return {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}


def answered(key: str, text: str, model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    body = {"id": "c", "object": "chat.completion", "created": 0, "model": model}
    response = {"status_code": 200, "request_id": "r", "body": {**body, "choices": [choice]}}
    return {"id": "b", "custom_id": key, "response": response, "error": None}


def batch(folder: Path, tokenizer: Path, texts: dict[str, str], model: str) -> Path:
    """Import a batch of one response to each of the prompts `texts`, with two reward components."""
    requests = [request(f"{model}-{n}", text) for n, text in enumerate(texts)]
    results = [answered(f"{model}-{n}", answer, model) for n, answer in enumerate(texts.values())]
    rewards = [
        {"custom_id": f"{model}-{n}", "right": float(n), "short": 0.5} for n in range(len(texts))
    ]
    settings = {
        "requests": str(write_jsonl(folder / f"{model}-requests.jsonl", requests)),
        "rewards": str(write_jsonl(folder / f"{model}-rewards.jsonl", rewards)),
        "format": "openai_batch",
        "tokenizer_name_or_path": str(tokenizer),
        "singletons": "keep",
    }
    import_log(config(write_jsonl(folder / f"{model}.jsonl", results), folder / model, **settings))
    return folder / model


def test_two_batches_of_one_response_each(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Two models answer three prompts, of which two are the same: two groups, two prompts wait.

    The components of the rewards are kept: right is the number of the request, short is 0.5.
    """
    one = batch(tmp_path, tiny_tokenizer_dir, {"1 + 1?": "2", "2 + 3?": "5", "x?": "y"}, "big")
    assert load_manifest(one).n_groups == 0
    first = {g.messages: g.group_id for g in waiting(one)}
    two = batch(tmp_path, tiny_tokenizer_dir, {"2 + 3?": "6", "1 + 1?": "3", "z?": "w"}, "small")
    manifest = join(one, two)
    assert (manifest.n_groups, manifest.n_incomplete) == (2, 2)
    assert [family.components for family in manifest.rewards] == [["right", "short"]]
    with_parts = GroupDataset(one, manifest, choose_reward_families(manifest, None))
    joined = with_parts.groups(0, [*ALL_COLUMNS, "rewards", "components"])
    found = {json.loads(g.messages or "")[0]["content"]: g for g in joined}
    sums = found["2 + 3?"]
    assert (sums.responses, sums.samplers) == (("5", "6"), ("big", "small"))
    assert sums.rewards is not None
    assert sums.rewards.tolist() == [1.5, 0.5]
    assert sums.components is not None
    assert sums.components.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    # Ids are the hash of the prompt: those that waited keep theirs.
    assert all(first[group.messages] == group.group_id for group in joined)
    left = {json.loads(g.messages or "")[0]["content"]: g for g in waiting(one)}
    assert set(left) == {"x?", "z?"}
    assert left["z?"].components is not None
    assert left["z?"].components.tolist() == [[2.0], [0.5]]
    with pytest.raises(ConfigError, match="log-probs of one reference"):  # alone is missing
        open_for_training(one)


def gym(task: int, text: str, reward: float) -> dict[str, Any]:
    part = {"annotations": [], "text": text, "type": "output_text", "logprobs": None}
    message = {"id": "m", "content": [part], "role": "assistant", "status": "completed"}
    asked = {"role": "user", "content": f"{task} + 1?", "type": "message"}
    return {
        "responses_create_params": {"input": [asked], "tools": []},
        "response": {
            "id": "r", "created_at": 0.0, "error": None, "incomplete_details": None,
            "model": "policy", "object": "response", "output": [{**message, "type": "message"}],
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "status": None,
        },
        "reward": reward, "_ng_task_index": task, "_ng_rollout_index": 0,
    }  # fmt: skip


def test_nemo_gym_with_one_rollout_of_each_task(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Two runs over three tasks, one rollout of each; ids name the run, so prompts are compared."""
    settings = {"format": "nemo_gym", "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    for run in (1, 2):
        rows = [gym(task, str(task + run), float(run == 1)) for task in range(run, run + 3)]
        path = write_jsonl(tmp_path / f"run{run}" / "rollouts.jsonl", rows)
        import_log(config(path, tmp_path / f"data{run}", singletons="keep", **settings))
    manifest = join(tmp_path / "data1", tmp_path / "data2", match="prompt", response_ids="drop")
    assert (manifest.n_groups, manifest.n_incomplete) == (2, 2)
    groups = read_groups(tmp_path / "data1")
    assert {g.responses for g in groups} == {("3", "4"), ("4", "5")}
    assert all(g.rewards is not None and g.rewards.tolist() == [1.0, 0.0] for g in groups)


# ---- sample ----


def logged(tmp_path: Path, tokenizer: Path, **settings: Any) -> Path:
    """A chat log without rewards: three prompts with one answer, one prompt with two."""
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {n} + 3?"}], "response": str(n + r)}
        | {"answer": n + 3}
        for n, r in ((0, 3), (1, 3), (2, 3), (3, 3), (3, 4))
    ]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    settings = {
        "tokenizer_name_or_path": str(tokenizer),
        "columns": Columns(reward=None, keep=["answer"]),
        "singletons": "keep",
        **settings,
    }
    import_log(config(log, tmp_path / "log", **settings))
    return tmp_path / "log"


@pytest.mark.parametrize("k", [1, 2])
def test_sampling_completes_them(tmp_path: Path, tiny_model_dir: Path, k: int) -> None:
    """k responses are drawn to each of the three prompts; merged, all are groups of 1 + k."""
    data = logged(tmp_path, tiny_model_dir)
    before = {g.group_id: g for g in waiting(data)}
    assert len(before) == 3
    settings = sample_config(
        tmp_path,
        tiny_model_dir,
        {"me": local(tiny_model_dir, responses=k)},
        inputs=str(data),
        output_dir=str(tmp_path / "more"),
        keep_singletons=k == 1,
    )
    result = run_sample(settings)
    assert result.manifest is not None
    drawn = (result.manifest.n_groups, result.manifest.n_incomplete)
    assert drawn == ((0, 3) if k == 1 else (3, 0))
    assert run_sample(settings).manifest == result.manifest
    manifest = join(data, tmp_path / "more")
    assert (manifest.n_groups, manifest.n_incomplete) == (4, 0)
    groups = {group.group_id: group for group in read_groups(data)}
    for group_id, single in before.items():
        group = groups[group_id]
        assert group.samplers == ("log",) + ("me",) * k
        assert group.messages == single.messages
        assert json.loads(group.metadata or "") == json.loads(single.metadata or "")
        assert np.array_equal(group.response_token_ids[0], single.response_token_ids[0])
    # Sampled prompts keep the metadata, so that a reward can use the answer.
    if k == 2:
        assert {json.loads(g.metadata or "")["answer"] for g in read_groups(tmp_path / "more")} == {
            3,
            4,
            5,
        }


def test_prompts_that_are_tokenised_otherwise_are_refused(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """A system prompt, or another template, would give responses that a merge does not join."""
    data = logged(tmp_path, tiny_model_dir)
    samplers = {"me": local(tiny_model_dir)}
    more = {"inputs": [str(data)], "output_dir": str(tmp_path / "more")}
    with pytest.raises(DataError, match=r"token ids that its dataset has.*chat_template") as caught:
        run_sample(
            sample_config(tmp_path, tiny_model_dir, samplers, system_prompt="Be brief.", **more)
        )
    assert caught.value.row == 0
    with pytest.raises(ConfigError, match="keep_singletons: true"):
        sample_config(tmp_path, tiny_model_dir, {"me": local(tiny_model_dir, responses=1)}, **more)


def test_inputs_that_hold_no_prompt_to_sample(tmp_path: Path, tiny_model_dir: Path) -> None:
    samplers = {"me": local(tiny_model_dir)}
    import_rows(tmp_path / "whole", id_rows(2))
    options = {"output_dir": str(tmp_path / "more")}
    with pytest.raises(DataError, match=r"has incomplete groups.*singletons: keep"):
        run_sample(
            sample_config(
                tmp_path, tiny_model_dir, samplers, inputs=str(tmp_path / "whole"), **options
            )
        )
    import_rows(tmp_path / "ids", id_rows(2, k=1), singletons="keep")
    with pytest.raises(DataError, match="token ids alone") as caught:
        run_sample(
            sample_config(
                tmp_path, tiny_model_dir, samplers, inputs=str(tmp_path / "ids"), **options
            )
        )
    assert caught.value.group is not None


def test_a_dataset_and_files_of_prompts_are_sampled_together(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data = logged(tmp_path, tiny_model_dir)
    more = write_jsonl(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": "Hi"}]}])
    settings = sample_config(
        tmp_path,
        tiny_model_dir,
        {"me": local(tiny_model_dir, responses=2)},
        inputs=[str(more), str(data)],
        output_dir=str(tmp_path / "more"),
    )
    result = run_sample(settings)
    assert result.manifest is not None
    assert result.manifest.n_groups == 4
    assert "log" in [each["path"] for each in result.manifest.lineage[0].inputs]


def test_the_whole_is_what_one_import_gives(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Two logs in one import complete each other too, and give the groups of the merge."""
    rows = [
        {"prompt": f"{n} + 1?", "response": f"{n + r}", "reward": float(r)}
        for r in range(2)
        for n in range(4)
        if (n, r) != (3, 1)
    ]
    logs = [write_jsonl(tmp_path / f"{r}.jsonl", rows[4 * r : 4 * r + 4]) for r in range(2)]
    settings = {"tokenizer_name_or_path": str(tiny_tokenizer_dir), "singletons": "keep"}
    import_log(config(logs, tmp_path / "all", **settings))
    for r in range(2):
        import_log(config(logs[r], tmp_path / f"d{r}", **settings))
    assert load_manifest(tmp_path / "d0").n_incomplete == 4
    join(tmp_path / "d0", tmp_path / "d1")
    found, wanted = read_groups(tmp_path / "d0"), read_groups(tmp_path / "all")
    assert len(wanted) == 3
    assert [differences(a, b) for a, b in zip(found, wanted, strict=True)] == [[]] * 3
    assert [g.group_id for g in waiting(tmp_path / "d0")] == [
        g.group_id for g in waiting(tmp_path / "all")
    ]
    assert load_manifest(tmp_path / "d1").version == 1  # an added dataset is not changed
