"""Responses that a stop string ended: no end token is appended to their text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.importing import read_groups, write_jsonl
from support.sampling import config, local
from support.tiny_policy import train_tokenizer

from gvpo_offline.errors import DataError
from gvpo_offline.sampling.log import _SCHEMA, Sample, SampleLog, task_name
from gvpo_offline.sampling.run import run_sample
from gvpo_offline.sampling.vllm import VllmSampler
from gvpo_offline.store.parquet import footer_sha256
from gvpo_offline.tokenizer import load_tokenizer

END = 2


def test_a_stop_string_under_another_tokenizer(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Only text is kept here. It ends with the dataset's end token exactly where the model ended
    it; the log says which responses a stop string ended.
    """
    other = train_tokenizer(tmp_path / "other")
    tokenizer = load_tokenizer(str(other))
    tokenizer.add_tokens(["What is"])
    tokenizer.save_pretrained(other)
    stops = ["e", "a"]
    sampler = local(tiny_model_dir, stop=stops, max_new_tokens=40, responses=4)
    run_sample(config(tmp_path, other, {"s": sampler}, n=4, gaps="drop"))
    seen = {"stop string": 0, "other": 0}
    for group in read_groups(tmp_path / "data"):
        for text, ids, cut in zip(
            group.responses or (), group.response_token_ids, group.truncated, strict=True
        ):
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            stopped = any(string in text for string in stops)
            assert ids.tolist() == own + ([] if stopped or cut else [END])
            seen["stop string" if stopped else "other"] += 1
    assert seen["stop string"] > 3


def test_stop_strings_in_results_of_a_batch(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """A server that stops at a string, and one that stops at the end token's own text."""
    asked = {"kind": "openai_batch", "model": "tiny", "responses": 3, "stop": ["\n", "<eos>"]}
    run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": asked}, n=1))
    (path,) = (tmp_path / "data").rglob("requests-*.jsonl")
    requests = [json.loads(line) for line in path.read_text().splitlines()]
    results = [
        {
            "custom_id": request["custom_id"],
            "response": {
                "status_code": 200,
                "body": {
                    "choices": [
                        {
                            "message": {"content": f"answer {i}"},
                            "finish_reason": "stop",
                            "stop_reason": stop_reason,
                        }
                    ]
                },
            },
        }
        for i, (request, stop_reason) in enumerate(
            zip(requests, [None, "\n", "<eos>"], strict=True)
        )
    ]
    asked["results"] = [str(write_jsonl(tmp_path / "results.jsonl", results))]
    run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": asked}, n=1))
    (group,) = read_groups(tmp_path / "data")
    ended = {
        text: ids[-1] == END
        for text, ids in zip(group.responses or (), group.response_token_ids, strict=True)
    }
    assert ended == {"answer 0": True, "answer 1": False, "answer 2": True}


def test_logs_without_the_flag_are_read(tmp_path: Path) -> None:
    """As versions wrote them that did not record what ended a response."""
    log = SampleLog(tmp_path, "s", "sample-s")
    samples = [
        Sample(0, 0, 1, text="x", finish_reason="stop", stop_string="\n"),
        Sample(0, 1, 2, text="y", finish_reason="stop"),
        Sample(0, 2, 3, error="timeout"),
    ]
    new = log.write(task_name(0, 0), samples)
    assert [s.stop_string for s in log.read([new]).values()] == ["\n", None, None]
    names = [name for name in _SCHEMA.names if name != "stop_string"]
    path = tmp_path / new.files[0].path
    old = tmp_path / "old.parquet"
    pq.write_table(pq.read_table(path).select(names), old)
    older = SampleLog(tmp_path, "s", "sample-s")
    entry = new.files[0].model_copy(
        update={"path": "old.parquet", "footer_sha256": footer_sha256(old)}
    )
    read = older.read([new.model_copy(update={"files": [entry]})])
    assert [(s.text, s.stop_string) for s in read.values()] == [
        ("x", None),
        ("y", None),
        (None, None),
    ]


def vllm_output(**given: Any) -> Any:
    logprobs = [{5: SimpleNamespace(logprob=-1.0)}]
    return SimpleNamespace(token_ids=[5], logprobs=logprobs, **given)


@pytest.mark.parametrize(
    ("reason", "stop_reason", "ended", "by_string"),
    [
        ("stop", None, "stop", None),
        ("stop", 5, "stop", None),
        ("stop", "\n", "stop", "\n"),
        ("length", None, "length", None),
        ("repetition", "repetition_detected", "length", None),
    ],
)
def test_vllm_says_what_ended_a_response(
    reason: str, stop_reason: Any, ended: str, by_string: str | None
) -> None:
    sampler = VllmSampler.__new__(VllmSampler)
    sampler._tokenizer = SimpleNamespace(text=lambda ids: "x", same_as_dataset=False)  # type: ignore[assignment]
    request = SimpleNamespace(
        prompt=SimpleNamespace(index=0), number=0, seed=1, failed=lambda cause: cause
    )
    output = vllm_output(finish_reason=reason, stop_reason=stop_reason)
    sample = sampler._sample(request, output)  # type: ignore[arg-type]
    assert (sample.finish_reason, sample.stop_string) == (ended, by_string)
    aborted: Any = sampler._sample(request, vllm_output(finish_reason="abort", stop_reason=None))  # type: ignore[arg-type]
    assert aborted == "the finish reason 'abort'"


def test_prompts_with_pictures_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"prompt": "hi"}, {"prompt": "What is this?", "images": ["x.png"]}]
    inputs = str(write_jsonl(tmp_path / "pictures.jsonl", rows))
    settings = config(
        tmp_path, tiny_model_dir, {"s": local(tiny_model_dir)}, inputs=inputs, chat=False
    )
    with pytest.raises(DataError, match="received a value in the column 'images'") as caught:
        run_sample(settings)
    assert caught.value.row == 1
