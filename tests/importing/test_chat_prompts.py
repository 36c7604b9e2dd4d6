"""Text prompts as chats: `as_chat` and `system_prompt` of `import`, and the warning without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.importing import config, read_groups, write_jsonl
from support.sampling import config as sample_config
from support.sampling import local
from support.tiny_policy import train_tokenizer

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.importing.importer import run_import
from gvpo_offline.importing.settings import Columns
from gvpo_offline.sampling.run import run_sample
from gvpo_offline.tokenizer import load_tokenizer

WARNING = "a prompt is text without tokens of a chat template"
USER = {"role": "user", "content": "1 + 1?"}
SYSTEM = {"role": "system", "content": "Count."}


def imported(tmp_path: Path, tokenizer: Path, prompt: Any, **settings: Any) -> Group:
    rows = [{"prompt": prompt, "response": text, "reward": 0.0} for text in "ab"]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    own = config(log, tmp_path / "out", tokenizer_name_or_path=str(tokenizer), **settings)
    run_import(own)
    (group,) = read_groups(tmp_path / "out")
    return group


@pytest.mark.parametrize(
    ("prompt", "system", "expected"),
    [
        ("1 + 1?", None, [USER]),
        ("1 + 1?", "Count.", [SYSTEM, USER]),
        ([USER], None, [USER]),
        ([USER], "Count.", [SYSTEM, USER]),
        ([SYSTEM, USER], "Other.", [SYSTEM, USER]),
    ],
)
def test_the_prompt_is_that_of_the_chat(
    prompt: Any,
    system: str | None,
    expected: list[Any],
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its ids are those that the template gives for the messages."""
    group = imported(tmp_path, tiny_tokenizer_dir, prompt, as_chat=True, system_prompt=system)
    assert json.loads(group.messages or "") == expected
    assert group.prompt is None
    text = load_tokenizer(str(tiny_tokenizer_dir)).apply_chat_template(
        expected, tokenize=False, add_generation_prompt=True
    )
    ids = load_tokenizer(str(tiny_tokenizer_dir))(text, add_special_tokens=False)["input_ids"]
    assert group.prompt_token_ids.tolist() == ids
    assert WARNING not in caplog.text


def test_text_and_its_messages_are_one_group(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    rows = [
        {"prompt": prompt, "response": text, "reward": 0.0}
        for prompt, text in (("1 + 1?", "a"), ([USER], "b"))
    ]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    name = str(tiny_tokenizer_dir)
    run_import(config(log, tmp_path / "out", tokenizer_name_or_path=name, as_chat=True))
    (group,) = read_groups(tmp_path / "out")
    assert group.responses == ("a", "b")


def test_a_prompt_given_as_token_ids_stays_as_it_is(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    rows = [{"prompt": "1 + 1?", "ids": [5, 6], "response": r, "reward": 0.0} for r in "ab"]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    own = config(log, tmp_path / "out", as_chat=True, columns=Columns(prompt_token_ids="ids"))
    own.tokenizer_name_or_path = str(tiny_tokenizer_dir)
    run_import(own)
    (group,) = read_groups(tmp_path / "out")
    assert (group.prompt, group.prompt_token_ids.tolist()) == ("1 + 1?", [5, 6])


def test_a_system_prompt_before_text_is_refused(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    with pytest.raises(DataError, match=r"row 0: a system prompt goes before chat messages"):
        imported(tmp_path, tiny_tokenizer_dir, "1 + 1?", system_prompt="Count.")


def test_a_text_prompt_for_a_chat_tokenizer_is_warned_of_once(
    tmp_path: Path, tiny_tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    imported(tmp_path, tiny_tokenizer_dir, "1 + 1?")
    assert caplog.text.count(WARNING) == 1
    assert "log.jsonl, row 0 (counted from 0)" in caplog.text


def test_no_warning_for_prompts_that_were_rendered(
    tmp_path: Path, tiny_tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = load_tokenizer(str(tiny_tokenizer_dir)).eos_token
    imported(tmp_path, tiny_tokenizer_dir, f"1 + 1?{text}")
    assert WARNING not in caplog.text


def test_no_warning_without_a_template(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_tokenizer(tmp_path / "plain", chat_template=False)
    imported(tmp_path, tokenizer, "1 + 1?")
    assert WARNING not in caplog.text


def test_sample_warns_as_well(
    tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samplers = {"s": local(tiny_model_dir, max_new_tokens=2)}
    run_sample(sample_config(tmp_path, tiny_model_dir, samplers, n=2, chat=False))
    assert caplog.text.count(WARNING) == 1
