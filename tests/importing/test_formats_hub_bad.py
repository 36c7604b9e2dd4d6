"""Formats of data sets of the hub: refused rows and settings, with file, row and remedy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from support import hub_shapes as hub
from support.hub_shapes import TEXT, assistant, fragments, save, user
from support.importing import config, write_jsonl

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.formats import find_format
from gvpo_offline.importing.fragment import check_fragment, prompt_key
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns, ImportConfig

Row = dict[str, Any]
GOOD_PAIR: Row = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = [user("q"), assistant("a"), user("r")]


def arena(
    prompt: str = '["hi"]', a: str = '["a"]', b: str = '["b"]', votes: Any = (1, 0, 0)
) -> Row:
    return hub.arena_row(7, prompt, a, b, votes)


BAD: dict[str, tuple[str, datasets.Features, Row, str]] = {
    "preference: no prompt in common": (
        "preference",
        hub.PAIR_TEXTS_ALONE,
        {"chosen": "Blue.", "rejected": "Green."},
        "begin with the prompt, followed by one answer each.*Add the prompt column",
    ),
    "preference: nothing but the prompt": (
        "preference",
        hub.PAIR_TEXTS_ALONE,
        {"chosen": "The sky is blue.", "rejected": "The sky is blue."},
        "one answer each, and the answers differ",
    ),
    "preference: turns differ before the last": (
        "preference",
        hub.PAIR_TEXTS_ALONE,
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: d",
        },
        "followed by one answer each",
    ),
    "preference: no turn in common": (
        "preference",
        hub.PAIR_TEXTS_ALONE,
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: b\n\nAssistant: b"},
        "both begin with the prompt",
    ),
    "preference: messages without a prompt": (
        "preference",
        hub.PAIR_MESSAGES_ALONE,
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        "both begin with the prompt",
    ),
    "preference: a response that begins with the user": (
        "preference",
        hub.PAIR_MESSAGES_ALONE,
        {"chosen": [user("q"), user("r"), assistant("x")], "rejected": [user("q"), assistant("b")]},
        "a response begins with an assistant message; received the roles user, assistant",
    ),
    "preference: another prompt than in chosen": (
        "preference",
        hub.H4_BINARIZED,
        {**hub.h4_row("q", "a", "b", (1.0, 0.0)), "prompt": "another"},
        "the messages that both chosen and rejected begin with; received 'another'",
    ),
    "preference: other prompt messages than in chosen": (
        "preference",
        hub.PAIR_MESSAGES,
        {"prompt": CHAT, "chosen": CHAT[:2], "rejected": [user("q"), assistant("b")]},
        "the messages that both chosen and rejected begin with",
    ),
    "preference: a score is missing": (
        "preference",
        hub.H4_BINARIZED,
        hub.h4_row("q", "a", "b", (8.0, None)),
        r"received none for response 1. .*missing_rewards: drop",
    ),
    "preference: tools": (
        "preference",
        datasets.Features({**hub.PAIR_MESSAGES, "tools": hub.TEXTS}),
        {
            "prompt": CHAT[:1],
            "chosen": [assistant("a")],
            "rejected": [assistant("b")],
            "tools": ["{}"],
        },
        "the chat template renders the prompt's tools",
    ),
    "unpaired: a score as label": (
        "unpaired",
        datasets.Features({"prompt": TEXT, "completion": TEXT, "label": hub.FLOAT}),
        {"prompt": "q", "completion": "a", "label": 0.5},
        "a label is true or false; received 0.5.*format: flat",
    ),
    "unpaired: no label": (
        "unpaired",
        hub.UNPAIRED_TEXTS,
        {"prompt": "q", "completion": "a", "label": None},
        "each response has one; received none for response 0",
    ),
    "ultrafeedback: a 10 that was a 1": (
        "ultrafeedback",
        hub.ULTRAFEEDBACK_FIRST_RELEASE,
        hub.ultrafeedback_row(
            "q",
            [
                hub.completion("a", "good", 9.0, ("1", "1", "1", "1")),
                hub.completion("b", "bad", 10.0, ("1", "2", "N/A", "1")),
            ],
        ),
        "for some scores of 1; received 10 for .* 1.*'helpfulness': 1.0.*corrected release",
    ),
    "ultrafeedback: no completions": (
        "ultrafeedback",
        hub.ULTRAFEEDBACK,
        hub.ultrafeedback_row("q", []),
        "a row holds at least 1 response.*singletons: drop",
    ),
    "armorm: a score is missing": (
        "armorm",
        hub.ARMORM,
        {
            "prompt_id": "x",
            "prompt": "q",
            "all_generated_responses": ["a", "b"],
            "all_rm_scores": [0.5],
            "chosen": [],
            "rejected": [],
        },
        "rewards has one entry per response; received 1 for 2",
    ),
    "nectar: no markers": (
        "nectar",
        hub.NECTAR,
        hub.nectar_row("why?", [("a", 1.0), ("b", 2.0)]),
        r'a prompt is "\\n\\nHuman: .*received \'why\?\'',
    ),
    "nectar: the prompt has the answer": (
        "nectar",
        hub.NECTAR,
        hub.nectar_row("\n\nHuman: why?\n\nAssistant: so", [("a", 1.0), ("b", 2.0)]),
        "of one or more turns",
    ),
    "nectar: two turns of one side": (
        "nectar",
        hub.NECTAR,
        hub.nectar_row("\n\nHuman: a\n\nHuman: b\n\nAssistant: ", [("a", 1.0), ("b", 2.0)]),
        "of one or more turns",
    ),
    "nectar: rank from 0": (
        "nectar",
        hub.NECTAR,
        hub.nectar_row("\n\nHuman: q\n\nAssistant: ", [("a", 0.0), ("b", 1.0)]),
        "a rank is at least 1, and 1 is the best; received 0.0",
    ),
    "nectar: rank not a number": (
        "nectar",
        hub.NECTAR,
        hub.nectar_row("\n\nHuman: q\n\nAssistant: ", [("a", float("nan")), ("b", 1.0)]),
        "received (nan|none)",  # JSON has no NaN: `datasets` writes null
    ),
    "nectar: no rank": (
        "nectar",
        hub.NECTAR,
        hub.nectar_row("\n\nHuman: q\n\nAssistant: ", [("a", None), ("b", 1.0)]),
        "received none for response 0",
    ),
    "helpsteer2: ends with the assistant": (
        "helpsteer2",
        hub.HELPSTEER2,
        hub.helpsteer2_row("a\n<extra_id_1>Assistant\nb", "c", (1, 1, 1, 1, 1)),
        "the user's first and last",
    ),
    "helpsteer2: not rated at all": (
        "helpsteer2",
        hub.HELPSTEER2,
        hub.helpsteer2_row("a", "c", (None,) * 5),
        "received none for response 0",
    ),
    "helpsteer3: preference off the scale": (
        "helpsteer3",
        hub.HELPSTEER3,
        hub.helpsteer3_row(-100),
        "overall_preference lies between -3 and 3; received -100",
    ),
    "helpsteer3: no preference": (
        "helpsteer3",
        hub.HELPSTEER3,
        hub.helpsteer3_row(None),
        "received none for response 0",
    ),
    "openr1_math: verdicts short": (
        "openr1_math",
        hub.OPENR1,
        hub.openr1_row(["a", "b"], [True]),
        "each generation has one verdict; received 1 for 2",
    ),
    "openr1_math: no verdict": (
        "openr1_math",
        hub.OPENR1,
        hub.openr1_row(["a", "b"], None),
        "received none for response 0",
    ),
    "synthetic1: the verifier timed out": (
        "synthetic1",
        hub.SYNTHETIC1,
        hub.synthetic1_row("p", "a", None),
        "received none for response 0",
    ),
    "distilabel: prose for a rating": (
        "distilabel",
        hub.distilabel(TEXT),
        hub.distilabel_row(["5", "quite good", "1"]),
        "a rating is a number, or N/A; received 'quite good'",
    ),
    "distilabel: fewer ratings than generations": (
        "distilabel",
        hub.distilabel(hub.INT),
        hub.distilabel_row([1, 2]),
        "rewards has one entry per response; received 2 for 3",
    ),
    "arena: no JSON": (
        "arena",
        hub.ARENA,
        arena(a="plain"),
        "a is a list of texts in JSON",
    ),
    "arena: no list": ("arena", hub.ARENA, arena(b='"b"'), "response_b are a list"),
    "arena: no texts": ("arena", hub.ARENA, arena(b="[1]"), "response_b is a list of texts"),
    "arena: half a surrogate": (
        "arena",
        hub.ARENA,
        arena(a='["\\ud83e"]'),
        "text is valid Unicode; received '.ud83e'",
    ),
    "arena: a turn without an answer": (
        "arena",
        hub.ARENA,
        arena(prompt='["hi","more"]'),
        "one entry per turn; received 2 and 1",
    ),
    "arena: two winners": (
        "arena",
        hub.ARENA,
        arena(votes=(1, 1, 0)),
        r"one of winner_model_a, .* is 1 and the others are 0; received \[1.0, 1.0, 0.0\]",
    ),
    "arena: past of its own": (
        "arena",
        hub.ARENA,
        arena('["hi","more"]', '["a1","a2"]', '["b1","b2"]'),
        r"at least 2 responses; received 1 .*singletons: drop",
    ),
}


@pytest.mark.parametrize("kind", ["arrow", "jsonl"])
@pytest.mark.parametrize("name", BAD)
def test_bad_row(tmp_path: Path, tiny_tokenizer_dir: Path, name: str, kind: str) -> None:
    """The import stops and says where and what; nothing is left behind."""
    format, features, row, message = BAD[name]
    path = save(tmp_path / "log", features, [row], kind)
    settings = config(
        path,
        tmp_path / "out",
        format=format,
        tokenizer_name_or_path=str(tiny_tokenizer_dir),
    )
    with pytest.raises(DataError, match=message) as caught:
        import_log(settings)
    assert (caught.value.file, caught.value.row) == (str(path), 0)
    assert not (tmp_path / "out").exists()


FORMATS = sorted(hub.WHOLE)


@pytest.mark.parametrize("format", FORMATS)
def test_another_data_set(tmp_path: Path, format: str) -> None:
    """A row without the format's columns is refused by their names, in any kind of file."""
    message = f"a row of format: {format} has the columns .*received no .* among x, y.*format: flat"
    data = datasets.Dataset.from_list([{"x": 1, "y": 2}])
    data.to_parquet(tmp_path / "log.parquet")
    log = write_jsonl(tmp_path / "log.jsonl", [{"x": 1, "y": 2}])
    for path in (tmp_path / "log.parquet", log):
        with pytest.raises(DataError, match=message):
            fragments(path, format)


ODD: tuple[Any, ...] = (
    *(None, 1, -1.5, True, float("nan"), 10**400, "", "text", "\ud83e", [], {}, [None], [[]], [{}]),
    *([1, 2], ["a", 3], {"a": [1]}, {"role": 1}, [{"role": "user"}]),
    [{"role": "assistant", "content": None}],
)


class Somewhere:
    """An input whose rows name their own columns."""

    label = "somewhere"
    columns = None

    def refuse(self, error: DataError, record: Any = None) -> None:
        raise error


def mutations(value: Any) -> Iterator[Any]:
    """`value` with one odd value in one place, at any depth, or without one of its entries."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        for part in (*ODD, *mutations(value[key])):
            changed = copy.copy(value)
            changed[key] = part
            yield changed
        shorter = copy.copy(value)
        del shorter[key]
        yield shorter


@pytest.mark.parametrize("format", FORMATS)
def test_values_of_other_types(format: str) -> None:
    """Whatever a row holds, and wherever: it is read as text and messages, or refused."""
    let_pass: Any = {"missing_rewards": "drop", "empty_responses": "drop", "singletons": "drop"}
    settings = ImportConfig("x", "y", format=format, **let_pass)
    log_format = find_format(settings)
    outcomes = {"read": 0, "refused": 0}
    for row in mutations(hub.WHOLE[format][1][0]):
        try:
            for fragment in log_format.read([(0, row)], Somewhere()):
                check_fragment(fragment, settings, vocab_size=None)
                texts = (fragment.prompt, fragment.messages, *fragment.responses)
                assert all(text is None or text.encode() is not None for text in texts)
                assert prompt_key(fragment)
            outcomes["read"] += 1
        except DataError:
            outcomes["refused"] += 1
    assert outcomes["read"], outcomes
    assert outcomes["refused"] > 20, outcomes


def test_settings_that_the_format_has_no_use_for(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", [GOOD_PAIR])
    with pytest.raises(ConfigError, match=r"only columns.keep is set; received columns.prompt\."):
        fragments(log, "preference", columns=Columns(prompt="q"))
    with pytest.raises(ConfigError, match=r"received style. Choose among helpfulness, .*verbosity"):
        fragments(log, "helpsteer2", reward_weights={"style": 1.0, "helpfulness": 1.0})
    for format in ("preference", "flat", "groups"):
        with pytest.raises(ConfigError, match="this format's reward has no parts"):
            fragments(log, format, reward_weights={"score": 1.0})
    with pytest.raises(DataError, match=r"has the columns chosen, rejected, who; received no who"):
        fragments(log, "preference", columns=Columns(keep=["who"]))
