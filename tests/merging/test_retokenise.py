"""`retokenise`: the same texts and rewards as token ids of another tokenizer and template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.importing import config, write_jsonl
from support.tiny_policy import train_tokenizer
from transformers import AutoTokenizer

from gvpo_offline import cli
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Group
from gvpo_offline.importing.importer import run_import
from gvpo_offline.importing.settings import Columns
from gvpo_offline.merging.retokenise import RetokeniseResult, retokenise
from gvpo_offline.merging.settings import RetokeniseConfig
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import load_manifest
from gvpo_offline.store.validate import validate
from gvpo_offline.workers.settings import WorkerSettings

OTHER = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "<eos>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
ALL = [
    "prompt_token_ids",
    "response_token_ids",
    "responses",
    "messages",
    "prompt",
    "metadata",
    "response_ids",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tokenizers with different merges, ids and templates."""
    folder = tmp_path_factory.mktemp("tokenizers")
    one = train_tokenizer(folder / "one")
    two = train_tokenizer(folder / "two")
    tokenizer = AutoTokenizer.from_pretrained(two)
    tokenizer.add_tokens(["answer", "What"])  # other ids and lengths for the same texts
    tokenizer.chat_template = OTHER
    tokenizer.save_pretrained(two)
    return one, two


def rows(*, chat: bool) -> list[dict[str, Any]]:
    """Four groups of three responses, the last of which was cut; one prompt has one response."""
    found = []
    for number in range(4):
        text = f"What is {number} + 2?"
        prompt = [{"role": "user", "content": text}] if chat else text
        for i in range(3):
            row = {"prompt": prompt, "response": f"The answer is {number + i}.", "reward": i / 2}
            found.append({**row, "truncated": i == 2, "answer": number + 2})
    single = "Say hello"
    prompt = [{"role": "user", "content": single}] if chat else single
    return [*found, {"prompt": prompt, "response": "Hello!", "reward": 0.5, "truncated": False}]


def imported(root: Path, tokenizer: Path, *, chat: bool) -> Path:
    log = write_jsonl(root.parent / f"{root.name}.jsonl", rows(chat=chat))
    columns = Columns(keep=[])
    options: dict[str, Any] = {"columns": columns, "source": "log", "singletons": "keep"}
    run_import(config(log, root, tokenizer_name_or_path=str(tokenizer), **options))
    return root


def rewritten(dataset: Path, output: Path, tokenizer: Path, **options: Any) -> RetokeniseResult:
    settings = RetokeniseConfig(str(dataset), str(output), str(tokenizer), **options)
    result = retokenise(settings, WorkerSettings(show_progress=False))
    assert result is not None
    return result


def groups(dataset: GroupDataset) -> list[Group]:
    return [g for i in range(dataset.n_row_groups) for g in dataset.groups(i, ALL)]


@pytest.mark.parametrize("chat", [True, False])
def test_it_equals_an_import_with_the_other_tokenizer(
    tmp_path: Path, tokenizers: tuple[Path, Path], chat: bool
) -> None:
    """Prompts, responses and rewards, by the texts: ids of groups without one of the log are made
    from token ids, so only their order differs.
    """
    one, two = tokenizers
    old = imported(tmp_path / "old", one, chat=chat)
    result = rewritten(old, tmp_path / "new", two)
    direct = imported(tmp_path / "direct", two, chat=chat)

    def by_text(root: Path) -> dict[Any, Any]:
        return {
            (g.prompt, g.messages): (
                g.prompt_token_ids.tolist(),
                [own.tolist() for own in g.response_token_ids],
                g.responses,
                list(g.rewards if g.rewards is not None else []),
            )
            for g in groups(open_dataset(root, join=("reward",)))
        }

    assert by_text(tmp_path / "new") == by_text(direct)
    manifest = load_manifest(tmp_path / "new")
    assert manifest.tokenizer == load_manifest(direct).tokenizer
    assert manifest.n_incomplete == 1
    assert [g.group_id for g in groups(open_dataset(old, join=()))] == [
        g.group_id for g in groups(open_dataset(tmp_path / "new", join=()))
    ]
    validate(tmp_path / "new", lambda each, label: each)
    again = rewritten(old, tmp_path / "new", two)
    assert again.manifest == result.manifest
    with pytest.raises(DataError, match="the output folder is empty, or holds the result"):
        rewritten(old, tmp_path / "new", one)


def test_references_stay_behind_and_every_reward_comes_along(
    tmp_path: Path, tokenizers: tuple[Path, Path]
) -> None:
    from support.merging import add_sidecars

    one, two = tokenizers
    old = imported(tmp_path / "old", one, chat=True)
    before = add_sidecars(old)
    result = rewritten(old, tmp_path / "new", two)
    assert result.manifest.references == []
    assert "reference" in " ".join(result.lines())
    assert [f.name for f in result.manifest.rewards] == [f.name for f in before.rewards]
    for name in ("reward", "length"):
        found, held = (
            groups(open_dataset(root, reward=name, join=("reward",)))
            for root in (tmp_path / "new", old)
        )
        for one_group, other in zip(found, held, strict=True):
            np.testing.assert_array_equal(one_group.rewards, other.rewards)


def test_token_ids_alone_are_refused(tmp_path: Path, tokenizers: tuple[Path, Path]) -> None:
    from support.importing import id_rows
    from support.merging import import_rows

    import_rows(tmp_path / "old", id_rows(3, k=2), tokenizer_name_or_path=str(tokenizers[0]))
    with pytest.raises(DataError, match=r"needs the texts.*no text or messages") as error:
        rewritten(tmp_path / "old", tmp_path / "new", tokenizers[1])
    assert error.value.group is not None
    assert not list((tmp_path / "new").rglob("*.parquet"))


def test_a_rendered_prompt_is_refused(tmp_path: Path, tokenizers: tuple[Path, Path]) -> None:
    """Another model's template cannot be applied to a text that holds the marks of this one."""
    row = {"prompt": "<|user|>\nHi<eos>\n<|assistant|>\n", "reward": 0.0}
    log = write_jsonl(
        tmp_path / "log.jsonl", [{**row, "response": text} for text in ("Hello!", "Yes")]
    )
    run_import(config(log, tmp_path / "old", tokenizer_name_or_path=str(tokenizers[0])))
    with pytest.raises(DataError, match="kept as messages"):
        rewritten(tmp_path / "old", tmp_path / "new", tokenizers[1])


def test_the_old_tokenizer_is_needed(tmp_path: Path, tokenizers: tuple[Path, Path]) -> None:
    moved = train_tokenizer(tmp_path / "here")
    old = imported(tmp_path / "old", moved, chat=True)
    os.rename(moved, tmp_path / "there")
    with pytest.raises(ConfigError, match="old_tokenizer_name_or_path"):
        rewritten(old, tmp_path / "new", tokenizers[1])
    there = str(tmp_path / "there")
    rewritten(old, tmp_path / "new", tokenizers[1], old_tokenizer_name_or_path=there)


def test_the_command(
    tmp_path: Path, tokenizers: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    old = imported(tmp_path / "old", tokenizers[0], chat=True)
    flags = {"dataset": old, "output_dir": tmp_path / "new"}
    flags["tokenizer_name_or_path"] = tokenizers[1]
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({name: str(value) for name, value in flags.items()}))
    assert cli.main(["retokenise", "--config", str(settings), "--show_progress", "false"]) == 0
    out = capsys.readouterr().out
    assert "retokenise: 4 groups, 12 responses" in out
    assert "reference" in out
