"""`import --format inspect`: logs of Inspect, as `.eval` archives and as JSON."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.chat_templates import chat_tokenizer
from support.importing import config, read_groups
from support.reading_formats import fragments

from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.importing.importer import import_log
from gvpo_offline.tokenizer import load_tokenizer

SYSTEM = {"id": "KbRXi6", "content": "Say Yes or No.", "role": "system"}


def user(text: str) -> dict[str, Any]:
    return {"id": "DqUGR3", "content": text, "source": "input", "role": "user"}


def assistant(content: Any, **further: Any) -> dict[str, Any]:
    return {
        "id": "JNtNFn", "content": content, "source": "generate", "role": "assistant",
        "model": "gemma3", **further,
    }  # fmt: skip


def sample(
    number: int, epoch: int, answer: Any, value: Any = "C", **changed: Any
) -> dict[str, Any]:
    """A sample with the fields of UKGovernmentBEIS/inspect_ai, commit 62d91db,
    tests/log/test_eval_log/log_read_sample.json."""
    said = answer if isinstance(answer, dict) else assistant(answer)
    return {
        "id": number,
        "epoch": epoch,
        "input": f"Is {number} odd?",
        "target": " Yes",
        "messages": [SYSTEM, user(f"Is {number} odd?"), said],
        "output": {
            "model": "gemma3",
            "choices": [{"message": said, "stop_reason": "stop"}],
            "usage": {"input_tokens": 66, "output_tokens": 3, "total_tokens": 69},
            "time": 1.9,
        },
        "scores": {"match": {"value": value, "answer": "Yes", "explanation": "Yes\n"}},
        "metadata": {"label_confidence": 0.8},
        "store": {},
        "events": [],
        "model_usage": {},
        "uuid": f"8rN5{number}{epoch}",
        "attachments": {},
    } | changed  # fmt: skip


HEADER = {
    "version": 2,
    "status": "success",
    "eval": {
        "task": "popularity", "model": "ollama/gemma3", "dataset": {"sample_ids": [1]},
        "scorers": [{"name": "match", "options": {}}],
    },
    "plan": {"name": "plan", "steps": [{"solver": "generate", "params": {}}], "config": {}},
}  # fmt: skip


def as_json(path: Path, samples: Sequence[Any], header: Any = None) -> Path:
    """A `.json` log: indented, the samples after the header."""
    path.write_text(json.dumps({**(header or HEADER), "samples": list(samples)}, indent=2))
    return path


def archive(path: Path, members: Sequence[tuple[str, Any]], method: int) -> Path:
    """A zip archive of JSON members, compressed as `method` says; 93 is Zstandard, in two frames,
    as Inspect writes long members."""
    entries, body = [], b""
    for name, value in members:
        text = json.dumps(value).encode()
        if method == 93:
            codec = pa.Codec("zstd")
            halves = (text[: len(text) // 2], text[len(text) // 2 :])
            data = b"".join(codec.compress(half, asbytes=True) for half in halves)
        else:
            deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
            data = text if method == 0 else deflate.compress(text) + deflate.flush()
        fields = (20, 0, method, 0, 33, zlib.crc32(text), len(data), len(text), len(name), 0)
        entries.append((fields, name, len(body)))
        body += struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *fields) + name.encode() + data
    start = len(body)
    for fields, name, offset in entries:
        rest = (0, 0, 0, 0, offset)
        body += (
            struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, *fields, *rest) + name.encode()
        )
    n = len(entries)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, n, n, len(body) - start, start, 0)
    path.write_bytes(body + end)
    return path


def members(samples: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """The members of a log that is complete, in the order in which Inspect writes them."""
    start = {name: HEADER[name] for name in ("version", "eval", "plan")}
    return [
        ("_journal/start.json", start),
        *((f"samples/{s['id']}_epoch_{s['epoch']}.json", s) for s in samples),
        ("_journal/summaries/1.json", []),
        ("summaries.json", []),
        ("header.json", HEADER),
    ]


SAMPLES = [
    sample(n, e, "Yes\n" if n == e else "No\n", "CI"[n != e]) for e in (1, 2) for n in (1, 2)
]


@pytest.mark.parametrize("method", [0, 8, 93])
def test_an_archive_and_json_give_the_same(method: int, tmp_path: Path) -> None:
    path = archive(tmp_path / "log.eval", members(SAMPLES), method)
    if method != 93:
        with zipfile.ZipFile(path) as made:
            assert made.testzip() is None
    found, _ = fragments(path, "inspect")
    assert found == fragments(as_json(tmp_path / "log.json", SAMPLES), "inspect")[0]
    assert [fragment.row for fragment in found] == [0, 1, 2, 3]
    assert [fragment.rewards for fragment in found] == [[1.0], [0.0], [0.0], [1.0]]


def test_a_group_is_a_sample_over_its_epochs_and_logs(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    other = {**HEADER, "eval": {**HEADER["eval"], "model": "openai/gpt"}}
    paths = [
        archive(tmp_path / "a.eval", members(SAMPLES), 93),
        as_json(tmp_path / "b.json", [sample(2, 1, "Maybe\n", "P")], other),
    ]
    settings = {"format": "inspect", "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    import_log(config(paths, tmp_path / "out", **settings))
    groups = {json.loads(g.messages or "")[1]["content"]: g for g in read_groups(tmp_path / "out")}
    assert set(groups) == {"Is 1 odd?", "Is 2 odd?"}
    second = groups["Is 2 odd?"]
    assert second.responses == ("No\n", "Yes\n", "Maybe\n")
    assert second.samplers == ("ollama/gemma3", "ollama/gemma3", "openai/gpt")
    assert second.rewards is not None
    assert second.rewards.tolist() == [0.0, 1.0, 0.5]
    assert json.loads(second.messages or "")[0] == {"role": "system", "content": "Say Yes or No."}


def test_tools_reasoning_and_attachments(tmp_path: Path) -> None:
    """The response is all that follows the prompt; the tools are those of the first request; long
    texts of events stand among the attachments."""
    call = {"id": "c1", "function": "add", "arguments": {"x": 1}, "type": "function"}
    thought = {"type": "reasoning", "reasoning": "1 is small. ", "signature": "s"}
    turns = [
        user("Is 1 odd?"),
        assistant([thought, {"type": "text", "text": "Let me see."}], tool_calls=[call]),
        {"role": "tool", "content": "", "tool_call_id": "c1", "function": "add",
         "error": {"type": "timeout", "message": "too slow"}, "id": "x"},
        assistant("Yes"),
    ]  # fmt: skip
    tool = {"name": "add", "description": "attachment://d1", "parameters": {"type": "object"}}
    events = [
        {"event": "sample_init"},
        {"event": "model", "role": "grader", "tools": []},
        {"event": "model", "tools": [tool]},
    ]
    row = sample(1, 1, "Yes", messages=turns, events=events, attachments={"d1": "Adds."})
    (found,), _ = fragments(as_json(tmp_path / "log.json", [row]), "inspect")
    assert json.loads(found.messages or "") == [{"role": "user", "content": "Is 1 odd?"}]
    assert found.response_messages is not None
    function = {"name": "add", "arguments": {"x": 1}}
    assert json.loads(found.response_messages[0] or "") == [
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "1 is small. ",
         "tool_calls": [{"type": "function", "id": "c1", "function": function}]},
        {"role": "tool", "content": "too slow", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "Yes"},
    ]  # fmt: skip
    assert json.loads(found.template_arguments or "")["tools"] == [
        {"type": "function", "function": {**tool, "description": "Adds."}}
    ]


def test_tool_results_are_read_and_not_scored(tmp_path: Path) -> None:
    """To the tokens: what the model wrote counts, with the ends of its turns; what a tool returned
    does not."""
    name = tmp_path / "tokenizer"
    chat_tokenizer("qwen2_5").save_pretrained(name)
    call = {"id": "c1", "function": "add", "arguments": {"x": 1}, "type": "function"}
    turns = [
        user("Is 1 odd?"),
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": "odd it is", "tool_call_id": "c1", "function": "add"},
    ]
    rows = [
        sample(1, epoch, text, "CI"[epoch - 1], messages=[*turns, assistant(text)])
        for epoch, text in ((1, "Yes"), (2, "No"))
    ]
    path = archive(tmp_path / "log.eval", members(rows), 93)
    settings = {"format": "inspect", "tokenizer_name_or_path": str(name)}
    import_log(config(path, tmp_path / "out", **settings))
    (group,) = read_groups(tmp_path / "out")
    tokenizer = load_tokenizer(str(name))
    assert group.loss_mask is not None
    whole = [tokenizer.decode(ids) for ids in group.response_token_ids]
    own = [
        tokenizer.decode([int(i) for i, counts in zip(ids, mask, strict=True) if counts])
        for ids, mask in zip(group.response_token_ids, group.loss_mask, strict=True)
    ]
    called = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    assert own == [f"{called}Yes<|im_end|>", f"{called}No<|im_end|>"]
    assert all("odd it is" in text for text in whole)


def test_examples_in_the_input_belong_to_the_prompt(tmp_path: Path) -> None:
    """Logs of 2024 do not say which messages the model generated."""
    shots = [{"role": r, "content": c} for r, c in (("user", "1?"), ("assistant", "Yes"))]
    chat = [*shots, {"role": "user", "content": "2?"}]
    said = {"role": "assistant", "content": "No"}
    row = sample(1, 1, "No", input=chat, messages=[SYSTEM, *chat, said])
    (found,), _ = fragments(as_json(tmp_path / "log.json", [row]), "inspect")
    assert [m["content"] for m in json.loads(found.messages or "")][1:] == ["1?", "Yes", "2?"]
    assert found.responses == ["No"]
    bare = sample(1, 1, "No", messages=[])
    (found,), _ = fragments(as_json(tmp_path / "log.json", [bare]), "inspect")
    assert (json.loads(found.messages or ""), found.responses) == (
        [{"role": "user", "content": "Is 1 odd?"}], ["No"],
    )  # fmt: skip


def test_scores(tmp_path: Path) -> None:
    """Several scorers, a value with keys, labels of the task's own, and no scores at all."""
    two = {"match": {"value": "C"}, "judge": {"value": {"style": 3, "tone": "good"}}}
    path = as_json(tmp_path / "log.json", [sample(1, 1, "Yes", scores=two)])
    match = "has one scorer, which is the reward; received 3: match, judge.style, judge.tone"
    with pytest.raises(DataError, match=match):
        fragments(path, "inspect")
    weights = {"match": 1.0, "judge.tone": 0.5}
    (found,), _ = fragments(path, "inspect", reward_weights=weights, reward_map={"good": 3})
    assert found.rewards == [1.0 + 0.5 * 3]
    assert found.components == {"match": [1.0], "judge.tone": [3.0]}
    with pytest.raises(ConfigError, match=r"speed; the log has match, judge.style, judge.tone"):
        fragments(path, "inspect", reward_weights={"match": 1.0, "speed": 1.0})
    path = as_json(tmp_path / "unscored.json", [sample(1, 1, "Yes", scores=None)])
    (found,), _ = fragments(path, "inspect")
    assert found.rewards is None
    (found,), _ = fragments(path, "inspect", missing_rewards="drop")
    assert found.rewards == [None]
    path = as_json(tmp_path / "nan.json", [sample(1, 1, "Yes", float("nan"))])
    (found,), _ = fragments(path, "inspect")
    assert found.rewards == [None]


def test_endings_and_failures(tmp_path: Path) -> None:
    def ended(reason: str) -> dict[str, Any]:
        return {"output": {"choices": [{"message": assistant("Yes"), "stop_reason": reason}]}}

    rows = [
        sample(1, 1, "Yes", **ended("max_tokens")),
        sample(1, 2, "Yes", limit={"type": "message", "limit": 3}),
        sample(1, 3, "Yes", **ended("content_filter")),
        sample(1, 4, "Yes", error={"message": "TimeoutError()", "traceback": "…"}),
        sample(1, 5, "Yes", invalidation={"author": "a"}),
        sample(1, 6, "Yes", **ended("unknown")),
    ]
    path = as_json(tmp_path / "log.json", rows)
    with pytest.raises(DataError, match=r"3 that failed: row 2.*content_filter.*row 3.*TimeoutErr"):
        fragments(path, "inspect")
    found, counts = fragments(path, "inspect", failed_responses="drop")
    assert [fragment.truncated for fragment in found] == [[True], [True], [False]]
    assert counts["dropped_failed_responses"] == 3


IMAGE = [{"type": "image", "image": "attachment://1"}, {"type": "text", "text": "?"}]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (sample(1, 1, "Yes", "X"), "'match' that is a label is one of reward_map.*received 'X'"),
        (sample(1, 1, "Yes", ["C", "I"]), "the scorer 'match' is a number"),
        (sample(1, 1, "Yes", messages=[user("?")]), "a message that the model wrote"),
        (sample(1, 1, "Yes", messages=[assistant("a")]), "no message before the model's"),
        (
            sample(1, 1, "Yes", messages=[{**user(""), "content": IMAGE}, assistant("a")]),
            "the attachments that its messages name",
        ),
        (
            sample(
                1, 1, "Yes", attachments={"1": "data:"},
                messages=[{**user(""), "content": IMAGE}, assistant("a")],
            ),
            "a part of type 'image' in a message of role user",
        ),
        (sample(1, 1, assistant([{"type": "tool_use", "name": "web"}])), "type 'tool_use'"),
        (
            sample(1, 1, assistant([{"type": "reasoning", "reasoning": "x", "redacted": True}])),
            "encrypted",
        ),
        (
            sample(1, 1, assistant("", tool_calls=[{"function": "f", "parse_error": "bad"}])),
            "could not parse: bad",
        ),
        (
            sample(1, 1, "Yes", messages=[user("?"), {**assistant("Y"), "source": "input"},
                                          assistant("es")]),
            "whether the response continues that message",
        ),
        ({"id": 1, "epoch": 1}, "no input among"),
    ],
)  # fmt: skip
def test_refuses(row: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = as_json(tmp_path / "log.json", [sample(1, 2, "Yes"), row])
    with pytest.raises(DataError, match=match) as caught:
        fragments(path, "inspect")
    assert caught.value.row == 1


def test_archives_that_are_written_or_damaged(tmp_path: Path) -> None:
    """A log that is being written has no header.json; of a sample that was written twice the last
    one counts."""
    again = sample(1, 1, "Sure", "P")
    first, *others = members([SAMPLES[0]])
    running = [first, others[0], (others[0][0], again)]
    (found,), _ = fragments(archive(tmp_path / "run.eval", running, 8), "inspect")
    assert (found.responses, found.rewards) == (["Sure"], [0.5])
    path = archive(tmp_path / "log.eval", members(SAMPLES), 0)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"Is 2 odd?"', b'"Is 3 odd?"', 1))
    with pytest.raises(IntegrityError, match="than its checksum") as caught:
        fragments(path, "inspect")
    assert caught.value.row == 1
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(IntegrityError, match="a complete zip archive"):
        fragments(path, "inspect")
    chunks = [first, ("samples/1_epoch_1/sample.json", {})]
    with pytest.raises(DataError, match="samples in chunks"):
        fragments(archive(tmp_path / "chunks.eval", chunks, 8), "inspect")
    with pytest.raises(DataError, match=r"header\.json or _journal/start.json"):
        fragments(archive(tmp_path / "none.eval", members(SAMPLES)[1:2], 8), "inspect")
    with pytest.raises(
        DataError, match=r"a sample of a \.eval log is a JSON object; received list"
    ):
        fragments(archive(tmp_path / "x.eval", [first, (others[0][0], [])], 8), "inspect")
