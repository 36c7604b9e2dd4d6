"""`import --format sharegpt`: ShareGPT conversations and the layouts of LLaMA-Factory.

The shapes are those of files in the repository hiyouga/LLaMA-Factory (named in each test, with the
commit); texts are made up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chat_templates import chat_tokenizer
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import fragments, refused

from gvpo_offline.errors import DataError
from gvpo_offline.importing.importer import import_log


def turn(sender: str, value: str) -> dict[str, str]:
    return {"from": sender, "value": value}


def pair(*turns: dict[str, str], chosen: Any = None, rejected: Any = None) -> dict[str, Any]:
    return {
        "conversations": list(turns),
        "chosen": chosen or turn("gpt", "good"),
        "rejected": rejected or turn("gpt", "bad"),
    }


def write_array(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=2))
    return path


def messages(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def test_dpo_pairs(tmp_path: Path) -> None:
    """data/dpo_en_demo.json at 3075df156a6520392aecf5e30bf888b621c0959c, an indented array."""
    rows = [
        pair(turn("human", "a?")),
        pair(turn("system", "Teach."), turn("human", "a?"), turn("gpt", "A"), turn("human", "b?")),
        pair(turn("human", "a?"), chosen=turn("gpt", "better")),
    ]
    found, _ = fragments(write_array(tmp_path / "dpo.json", rows), "sharegpt")
    assert [messages(f.messages) for f in found] == [
        [{"role": "user", "content": "a?"}],
        [
            {"role": "system", "content": "Teach."},
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "b?"},
        ],
        [{"role": "user", "content": "a?"}],
    ]
    assert [f.responses for f in found] == [["good", "bad"], ["good", "bad"], ["better", "bad"]]
    assert all(f.rewards == [1.0, 0.0] and f.samplers == [None, None] for f in found)
    # Rewards of 1 and 0 only order one pair, so two pairs with one prompt are two groups.
    assert len({f.group_id for f in found}) == 3


def test_v1_pairs_with_parts_and_weights(tmp_path: Path) -> None:
    """data/v1_dpo_demo.jsonl at d66fa737bce35ea7f1ed1c1a26b7854016746653."""

    def v1(answer: str) -> list[dict[str, Any]]:
        texts = (("system", "Help."), ("user", "fall, love"), ("assistant", answer))
        return [
            {
                "role": role,
                "content": [{"type": "text", "value": text}],
                "loss_weight": float(role == "assistant"),
            }
            for role, text in texts
        ]

    row = {"chosen_messages": v1("One falls."), "rejected_messages": v1(" Ooh")}
    ((fragment,), _) = fragments(write_jsonl(tmp_path / "v1.jsonl", [row]), "sharegpt")
    assert messages(fragment.messages) == [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "fall, love"},
    ]
    assert (fragment.responses, fragment.rewards) == (["One falls.", " Ooh"], [1.0, 0.0])
    assert fragment.response_messages is None


def test_labels_group_by_prompt(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """data/kto_en_demo.json at 3a0f5b4fe72a5e02040081c47274f3ad67d5e668."""

    def kto(answer: str, label: Any) -> dict[str, Any]:
        said = [{"content": "1 + 1?", "role": "user"}, {"content": answer, "role": "assistant"}]
        return {"messages": said, "label": label}

    path = write_array(tmp_path / "kto.json", [kto("2", True), kto("3", False)])
    settings = {"format": "sharegpt", "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    import_log(config(path, tmp_path / "out", **settings))
    (group,) = read_groups(tmp_path / "out")
    assert group.messages == '[{"role": "user", "content": "1 + 1?"}]'
    assert group.responses == ("2", "3")
    assert group.rewards is not None
    assert group.rewards.tolist() == [1.0, 0.0]
    assert group.samplers == ("kto", "kto")


AREA = '{"name": "area", "arguments": {"sides": [5, 3]}}'
TOOLS = '[{"name": "area", "description": "Area", "parameters": {"type": "object"}}]'


def test_tool_turns_are_calls_and_results(tmp_path: Path) -> None:
    """The turns and tools of data/glaive_toolcall_en_demo.json at
    3075df156a6520392aecf5e30bf888b621c0959c, with the label of the KTO layout. What follows the
    last message of the user is the response; the result of the call is read, not scored."""
    turns = [
        turn("human", "5 by 3?"), turn("function_call", AREA), turn("observation", '{"area": 15}'),
        turn("gpt", "It is 15."),
    ]  # fmt: skip
    short = [turns[0], turn("gpt", "15")]
    rows = [
        {"conversations": said, "tools": TOOLS, "kto_tag": label}
        for said, label in ((turns, True), (short, False))
    ]
    tokenizer = chat_tokenizer("qwen2_5")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = {"format": "sharegpt", "tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    import_log(config(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", **settings))
    (group,) = read_groups(tmp_path / "out")
    prompt = tokenizer.decode(group.prompt_token_ids)
    assert '{"type": "function", "function": {"name": "area"' in prompt
    assert prompt.endswith("<|im_start|>user\n5 by 3?<|im_end|>\n<|im_start|>assistant\n")
    assert group.loss_mask is not None
    ids = group.response_token_ids[0]
    scored = tokenizer.decode(ids[group.loss_mask[0]])
    assert scored == f"<tool_call>\n{AREA}\n</tool_call><|im_end|>It is 15.<|im_end|>"
    assert '{"area": 15}' in tokenizer.decode(ids[~group.loss_mask[0]])
    assert tokenizer.decode(group.response_token_ids[1]) == "15<|im_end|>"


def test_alpaca_layout(tmp_path: Path) -> None:
    """The preference and KTO tables of data/README.md at
    015ff251ec0a8b5ca0aac9a8fb5735aa17f59868."""
    rows = [
        {"instruction": "Add.", "input": "1, 2", "chosen": "3", "rejected": "4", "system": "Do."},
        {"instruction": "Add.", "input": "", "history": [["Hi", "Yes?"]], "output": "3",
         "kto_tag": False},
    ]  # fmt: skip
    found, _ = fragments(write_jsonl(tmp_path / "a.jsonl", rows), "sharegpt")
    assert [messages(f.messages) for f in found] == [
        [{"role": "system", "content": "Do."}, {"role": "user", "content": "Add.\n1, 2"}],
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Add."},
        ],
    ]
    assert [f.rewards for f in found] == [[1.0, 0.0], [0.0]]


def test_turns_and_messages_give_the_same_fragments(tmp_path: Path) -> None:
    """{"from", "value"} and {"role", "content"} are two spellings of one conversation."""
    turns = [turn("system", "Add."), turn("human", "5 by 3?"), turn("function_call", AREA)]
    turns += [turn("observation", "15"), turn("gpt", "It is 15.")]
    function = json.loads(AREA)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    said = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": [{"type": "text", "value": "5 by 3?"}]},
        call,
        {"role": "tool", "content": "15"},
        {"role": "assistant", "content": "It is 15."},
    ]
    parts = [*said[:2], {"role": "assistant", "content": [{"type": "tool_call", "value": AREA}]}]
    rows = [
        {"conversations": turns, "label": True},
        {"messages": said, "label": True},
        {"messages": [*parts, *said[3:]], "label": True},
    ]
    one, two, three = fragments(write_jsonl(tmp_path / "a.jsonl", rows), "sharegpt")[0]
    two.row = three.row = one.row
    assert one == two == three


def test_json_and_parquet_give_the_same_fragments(tmp_path: Path) -> None:
    several = [turn("human", "b?"), turn("gpt", "B"), turn("human", "c?")]
    rows = [pair(turn("human", "a?")), pair(*several)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    from_json, _ = fragments(write_jsonl(tmp_path / "a.jsonl", rows), "sharegpt")
    from_parquet, _ = fragments(tmp_path / "a.parquet", "sharegpt")
    assert from_json == from_parquet


def weighted(role: str, weight: float) -> dict[str, Any]:
    return {"role": role, "content": f"by {role}", "loss_weight": weight}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (pair(turn("narrator", "a?")), "a turn is by one of human, user, gpt"),
        (pair(turn("human", "a?"), turn("gpt", "A")), "a message of the assistant at its end"),
        (pair(turn("human", "a?"), chosen=turn("function_call", "add()")), "function call is JSON"),
        ({"conversations": [turn("human", "a?"), turn("gpt", "b")]}, "chosen and rejected"),
        (
            {"conversations": [turn("human", "a?"), turn("gpt", "b")], "label": 0.7},
            "a label is true or false; received 0.7",
        ),
        ({"conversations": [turn("human", "a?")], "label": True}, "a message of role user at its"),
        ({"chosen": "a", "rejected": "b"}, "a row has a conversation"),
        (
            {"messages": [weighted("user", 0), weighted("assistant", 0.5)], "label": True},
            "received 0.5 for a message of role assistant",
        ),
        (
            {"chosen_messages": [weighted("user", 0)], "rejected_messages": [weighted("tool", 0)]},
            "begin with the same prompt",
        ),
        (pair(turn("human", "<image>")) | {"images": ["a.png"]}, "a value in the column 'images'"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "value": "a.png"}]},
                    weighted("assistant", 1),
                ],
                "label": True,
            },
            "a part of type 'image_url' in a message of role user",
        ),
    ],
)  # fmt: skip
def test_refused_rows(
    row: dict[str, Any], match: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    settings = {"tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    assert refused(path, "sharegpt", DataError, match, tmp_path / "o", **settings).row == 0
