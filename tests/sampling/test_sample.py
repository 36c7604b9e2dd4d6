"""Sampling in this process: prompts in, groups out, again and again the same."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.fork_server import ForkServer
from support.importing import content, read_groups, write_jsonl
from support.sampling import all_samples, config, local, prompt_rows
from support.tiny_policy import train_tokenizer

from gvpo_offline.errors import ConfigError, DataError, ServerError, StorageError
from gvpo_offline.sampling.log import SampleLog
from gvpo_offline.sampling.run import _Run, run_sample
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.manifest import load_manifest
from gvpo_offline.tokenizer import load_tokenizer, tokenizer_fingerprint


def test_groups_of_two_samplers(tmp_path: Path, tiny_model_dir: Path) -> None:
    """3 + 2 responses a prompt, in that order, with the ids that were drawn and all settings."""
    samplers = {
        "warm": local(tiny_model_dir),
        "cold": local(tiny_model_dir, responses=2, temperature=0.3, top_k=5),
    }
    result = run_sample(config(tmp_path, tiny_model_dir, samplers))
    assert result.responses == {"warm": 18, "cold": 12}
    manifest = result.manifest
    assert manifest is not None
    assert manifest.samplers["cold"]["top_k"] == 5
    assert manifest.samplers["warm"]["kind"] == "transformers"
    assert manifest.samplers["warm"]["model"] == manifest.samplers["cold"]["model"]
    assert [step.stage for step in manifest.lineage] == ["sample"]
    groups = read_groups(tmp_path / "data")
    assert len(groups) == 6
    tokenizer = load_tokenizer(str(tiny_model_dir))
    questions = {json.dumps(row["prompt"], ensure_ascii=False): row for row in prompt_rows(6)}
    for group in groups:
        assert group.samplers == ("warm",) * 3 + ("cold",) * 2
        assert group.rewards is None
        row = questions.pop(group.messages or "")
        assert json.loads(group.metadata or "") == {"answer": row["answer"]}
        rendered = tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True
        )
        own = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert group.prompt_token_ids.tolist() == own
        for ids, text, cut in zip(
            group.response_token_ids, group.responses or (), group.truncated, strict=True
        ):
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert cut == (ids[-1] != tokenizer.eos_token_id)
            assert len(ids) == 12 or not cut
    assert not questions


def test_a_response_depends_on_its_seed_alone(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Not on the size of tasks and batches, nor on what other prompts and samplers there are."""

    def responses(name: str, n: int, **settings: Any) -> dict[str, Any]:
        batch = settings.pop("batch_size")
        samplers = {"s": local(tiny_model_dir, batch_size=batch), **settings.pop("others", {})}
        run = config(
            tmp_path, tiny_model_dir, samplers, n=n, output_dir=str(tmp_path / name), **settings
        )
        run_sample(run)
        return {g.messages or "": (g.responses or ())[:3] for g in read_groups(tmp_path / name)}

    many = responses("many", 8, batch_size=2, prompts_per_task=2)
    others = {"t": local(tiny_model_dir)}
    few = responses("few", 5, batch_size=50, prompts_per_task=5, others=others)
    assert few.items() <= many.items()
    assert len(few) == 5
    assert len({text for texts in many.values() for text in texts}) > 20  # of 24


def test_log_probs_are_kept(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Of every token: log of p(token | text so far), by a forward over the whole text."""
    import torch
    from transformers import AutoModelForCausalLM

    run_sample(config(tmp_path, tiny_model_dir, {"s": local(tiny_model_dir, temperature=0.5)}, n=1))
    stage = next(path.name for path in (tmp_path / "data/commits").glob("sample-*"))
    log = SampleLog(tmp_path / "data", "s", stage)
    samples = list(log.read(log.rounds(0), logprobs=True).values())
    (group,) = read_groups(tmp_path / "data")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for sample in samples:
        assert sample.token_ids is not None
        ids = torch.tensor([[*group.prompt_token_ids.tolist(), *sample.token_ids.tolist()]])
        with torch.inference_mode():
            expected = (model(input_ids=ids).logits[0] / 0.5).log_softmax(-1)
        start = len(group.prompt_token_ids) - 1
        own = [float(expected[start + t, token]) for t, token in enumerate(sample.token_ids)]
        assert sample.token_logprobs is not None
        assert sample.token_logprobs.tolist() == pytest.approx(own, abs=1e-4)


def test_a_stop_string_ends_a_response(tmp_path: Path, tiny_model_dir: Path) -> None:
    """With its own tokens, and without an end token that nobody wrote."""
    samplers = {"s": local(tiny_model_dir, stop=["e", "a"], max_new_tokens=60, responses=4)}
    run_sample(config(tmp_path, tiny_model_dir, samplers))
    stopped = 0
    for group in read_groups(tmp_path / "data"):
        for text, ids, cut in zip(
            group.responses or (), group.response_token_ids, group.truncated, strict=True
        ):
            if "e" in text or "a" in text:
                stopped += 1
                assert not cut
                assert ids[-1] != 2
                tokenizer = load_tokenizer(str(tiny_model_dir))
                shorter = tokenizer.decode(ids[:-1], skip_special_tokens=True)
                assert not {"e", "a"} & set(shorter)
    assert stopped > 5


def test_a_model_with_another_tokenizer_gives_text(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Its ids mean nothing here: the text is tokenised with the dataset's own."""
    other = train_tokenizer(tmp_path / "other")
    tokenizer = load_tokenizer(str(other))
    tokenizer.add_tokens(["What is"])
    tokenizer.save_pretrained(other)
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(
        load_tokenizer(str(tiny_model_dir))
    )
    run_sample(config(tmp_path, other, {"s": local(tiny_model_dir)}, n=2, gaps="drop"))
    for group in read_groups(tmp_path / "data"):
        for text, ids, cut in zip(
            group.responses or (), group.response_token_ids, group.truncated, strict=True
        ):
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids.tolist() == own + ([] if cut else [2])


def test_another_template_is_still_the_same_tokenizer(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The model is asked what the dataset says, in the dataset's template."""
    template = tmp_path / "template.jinja"
    template.write_text("Q: {{ messages[0]['content'] }} A:")
    samplers = {"s": local(tiny_model_dir)}
    run_sample(config(tmp_path, tiny_model_dir, samplers, n=2, chat_template=str(template)))
    tokenizer = load_tokenizer(str(tiny_model_dir))
    prompts = {tokenizer.decode(g.prompt_token_ids) for g in read_groups(tmp_path / "data")}
    assert prompts == {"Q: What is 0 + 3? A:", "Q: What is 1 + 3? Be brief. A:"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_inputs_of_every_kind(tmp_path: Path, tiny_model_dir: Path, kind: str) -> None:
    """verl's prompts as they are, in each kind of file: one and the same dataset."""
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": row["prompt"],
            "ability": "math",
            "reward_model": {"ground_truth": str(row["answer"]), "style": "rule"},
            "extra_info": {"index": number, "split": "train"},
        }
        for number, row in enumerate(prompt_rows(3))
    ]
    path = tmp_path / f"train.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    run_sample(config(tmp_path, tiny_model_dir, {"s": local(tiny_model_dir)}, inputs=str(path)))
    groups = read_groups(tmp_path / "data")
    kept = sorted((json.loads(g.metadata or "") for g in groups), key=lambda m: str(m))
    assert kept == [{k: v for k, v in row.items() if k != "prompt"} for row in rows]


def test_text_becomes_a_chat(tmp_path: Path, tiny_model_dir: Path) -> None:
    samplers = {"s": local(tiny_model_dir)}
    run = config(
        tmp_path, tiny_model_dir, samplers, n=1, chat=False, as_chat=True, system_prompt="Count."
    )
    run_sample(run)
    (group,) = read_groups(tmp_path / "data")
    assert json.loads(group.messages or "") == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "What is 0 + 3?"},
    ]


def test_repeating_a_run_does_nothing(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = config(tmp_path, tiny_model_dir, {"s": local(tiny_model_dir)}, n=2)
    before = run_sample(run)
    files = sorted(p for p in (tmp_path / "data").rglob("*") if p.is_file())
    assert run_sample(run).manifest == before.manifest
    assert sorted(p for p in (tmp_path / "data").rglob("*") if p.is_file()) == files
    other = config(tmp_path, tiny_model_dir, {"s": local(tiny_model_dir, seed=1)}, n=2)
    with pytest.raises(DataError, match="made from other prompts, samplers or settings"):
        run_sample(other)


def test_a_sampler_added_to_an_unfinished_run_keeps_the_rest(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    broken = {"kind": "openai", "model": "x", "base_url": "http://127.0.0.1:9/v1"}
    broken |= {"max_attempts": 1, "responses": 1}
    samplers = {"s": local(tiny_model_dir), "gone": broken}
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9"):
        run_sample(config(tmp_path, tiny_model_dir, samplers, n=2))
    first = {path: path.stat().st_mtime_ns for path in all_samples(tmp_path / "data", ["s"])}
    assert first
    samplers = {"s": local(tiny_model_dir), "t": local(tiny_model_dir)}
    assert run_sample(config(tmp_path, tiny_model_dir, samplers, n=2)).manifest is not None
    assert {p: p.stat().st_mtime_ns for p in all_samples(tmp_path / "data", ["s"])} == first


def test_killed_at_any_moment_and_repeated(
    tmp_path: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    """SIGKILL before each of three commits, then two attempts at a time at random moments: the
    bytes of an undisturbed run, and nothing that was committed done again.
    """
    samplers = {"s": local(tiny_model_dir), "t": local(tiny_model_dir, responses=1, top_p=0.9)}
    whole = config(tmp_path, tiny_model_dir, samplers, n=48, prompts_per_task=2)
    expected = run_sample(whole).manifest
    assert expected is not None
    root = tmp_path / "killed"
    argv = ["sample", "--inputs", tmp_path / "prompts.jsonl", "--output_dir", root]
    argv += ["--tokenizer_name_or_path", tiny_model_dir, "--samplers", json.dumps(samplers)]
    argv += ["--prompts_per_task", 2]
    rng, kills = random.Random(1), 0
    for call in (1, 2, 5):  # of the prompts, of a first and of a later task
        child = server.start(argv, kill_at=["gvpo_offline.store.commit:create_only", call, 0.0])
        assert child.wait() == -9
    records: dict[Path, int] = {}
    while kills < 8 and not list(root.glob("manifest-*")):
        children = [server.start(argv) for _ in range(2)]
        for child in children:
            time.sleep(rng.uniform(0.05, 0.25))
            child.kill()
        kills += sum(child.wait() == -9 for child in children)
        found = {path: path.stat().st_ino for path in root.glob("commits/*/*.json")}
        assert records.items() <= found.items()
        records = found
    status, output = server.run(argv)
    assert status == 0, output
    assert kills >= 1
    assert content(load_manifest(root)) == content(expected)
    # What attempts left that lost is swept: 24 tasks of each sampler, a file each.
    assert len(all_samples(root, "st")) == 48
    assert len(list((root / "prompts").iterdir())) == 1


def test_a_stage_travels_to_a_worker(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Pickled before it starts, it writes the same file as in the process that made it."""
    samplers = {"s": local(tiny_model_dir)}
    run_sample(config(tmp_path, tiny_model_dir, samplers, n=4))
    again = config(tmp_path, tiny_model_dir, samplers, n=4, output_dir=str(tmp_path / "other"))
    stage = pickle.loads(pickle.dumps(_Run(again, tmp_path / "other").stages["s"]))
    assert [task.size for task in stage.tasks()] == [9, 3]  # 3 and 1 prompts
    stage.start()
    records = [stage.work(task) for task in reversed(stage.tasks())]
    assert [(tmp_path / "data" / record.files[0].path).exists() for record in records] == [True] * 2


def test_no_room_keeps_what_is_committed(
    tmp_path: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    """A limit on the size of files stands for a full disk; with room, the same command ends."""
    write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(40))
    argv = ["sample", "--inputs", tmp_path / "prompts.jsonl", "--output_dir", tmp_path / "data"]
    argv += ["--tokenizer_name_or_path", tiny_model_dir]
    argv += ["--samplers", json.dumps({"s": local(tiny_model_dir)})]
    status, output = server.run(argv, file_bytes=3500)
    assert status == 1
    assert "there must be room on the disk" in output
    status, output = server.run(argv)
    assert status == 0, output
    assert open_dataset(tmp_path / "data", join=()).n_groups == 40


def refused(tmp_path: Path, tokenizer: Path, samplers: dict[str, Any], **settings: Any) -> str:
    """What a run says that is refused before anything is asked."""
    with pytest.raises((DataError, ConfigError)) as caught:
        run_sample(config(tmp_path, tokenizer, samplers, **settings))
    assert not (tmp_path / "data/samples").exists()
    return str(caught.value)


def test_prompts_that_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    samplers = {"s": local(tiny_model_dir)}

    def of(rows: list[Any], **settings: Any) -> str:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        path = write_jsonl(tmp_path / "bad.jsonl", rows)
        return refused(tmp_path, tiny_model_dir, samplers, inputs=str(path), **settings)

    good = {"prompt": "What?"}
    assert "bad.jsonl, row 1" in of([good, {"text": "What?"}])
    assert "a prompt is not empty" in of([good, {"prompt": ""}])
    assert "at least 1 prompt" in of([])
    twice = of([good, {"prompt": "x"}, good])
    assert "bad.jsonl, row 2: a prompt occurs once" in twice
    assert "row 0, again" in twice
    assert "goes before chat messages" in of([good], system_prompt="Count.")
    long = of([good, {"prompt": "a b c d " * 200}])
    assert "bad.jsonl, row 1" in long
    assert "for sampler 's' it has at most 500 tokens" in long  # 512 - 12
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('no system') }}")
    chats = [{"prompt": [{"role": "user", "content": "What?"}]}]
    failed = of(chats, chat_template=str(template))
    assert "bad.jsonl, row 0" in failed
    assert "no system" in failed


def test_prompts_left_out_are_counted(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"prompt": "One"}, {"prompt": "a b c d " * 200}, {"prompt": "One"}, {"prompt": "Two"}]
    path = write_jsonl(tmp_path / "some.jsonl", rows)
    run = config(
        tmp_path,
        tiny_model_dir,
        {"s": local(tiny_model_dir)},
        inputs=str(path),
        duplicate_prompts="drop",
        overlong_prompts="drop",
    )
    result = run_sample(run)
    assert result.counts == {"dropped_duplicate_prompts": 1, "dropped_overlong_prompts": 1}
    assert sorted(g.prompt or "" for g in read_groups(tmp_path / "data")) == ["One", "Two"]


@pytest.mark.parametrize(
    ("samplers", "says"),
    [
        ({"s": {"kind": "oracle"}}, "kind is one of transformers, openai, vllm, openai_batch"),
        ({"s": {"kind": "transformers"}}, "Field required at samplers.s.model_name"),
        ({"s": local(Path("m"), tempo=1)}, "Unexpected keyword argument at samplers.s.tempo"),
        ({"s": local(Path("m"), top_p=0.0)}, r"top_p is in \(0, 1\]"),
        ({"s": local(Path("m"), temperature=0)}, "at temperature 0 all responses"),
        ({"s": local(Path("m"), responses=1)}, "at least 2 responses"),
        ({"a b": local(Path("m"))}, "a sampler's name"),
        ({}, "samplers must be set"),
    ],
)
def test_samplers_that_are_refused(tmp_path: Path, samplers: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(tmp_path, Path("t"), samplers)


def test_two_samplers_of_one_name(tmp_path: Path, server: ForkServer) -> None:
    path = tmp_path / "sample.yaml"
    path.write_text("samplers:\n  a: {kind: vllm}\n  a: {kind: openai}\n")
    status, output = server.run(["sample", "--config", path])
    assert status == 1
    assert "'a' occurs twice" in output


def test_a_model_that_is_not_there(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    assert "the model is a folder" in refused(
        tmp_path, tiny_tokenizer_dir, {"s": local(tmp_path / "none")}
    )
    vllm = {"kind": "vllm", "model_name_or_path": str(tiny_tokenizer_dir)}
    assert "folder or hub name" in refused(tmp_path, tiny_tokenizer_dir, {"s": vllm})


def test_a_folder_with_other_things(tmp_path: Path, tiny_model_dir: Path) -> None:
    samplers = {"s": local(tiny_model_dir)}
    run_sample(config(tmp_path, tiny_model_dir, samplers, n=2))
    os.unlink(next((tmp_path / "data").glob("manifest-*")))
    with pytest.raises(DataError, match="prompts of other inputs"):
        run_sample(config(tmp_path, tiny_model_dir, samplers, n=3))
    (tmp_path / "data/notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt"):
        run_sample(config(tmp_path, tiny_model_dir, samplers, n=2))
    assert issubclass(StorageError, OSError)
