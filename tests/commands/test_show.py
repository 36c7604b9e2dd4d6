"""`show`: the texts of ids with special tokens, masks, rewards and log-probs; what it reads."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import (
    build_dataset,
    make_group,
    make_groups,
    reference_family,
    reference_sidecar,
    training_table,
)
from support.chat_templates import byte_level_tokenizer, metaspace_tokenizer
from support.importing import ID_COLUMNS, config, id_rows, write_jsonl
from support.remote_servers import FolderServer
from support.tiny_policy import CHAT_TEMPLATE

from gvpo_offline import cli
from gvpo_offline.commands.console import has_styles
from gvpo_offline.commands.settings import ShowConfig
from gvpo_offline.commands.show.made import made_lines
from gvpo_offline.commands.show.run import show, show_lines
from gvpo_offline.commands.show.text import Style
from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.group import Group
from gvpo_offline.importing.importer import run_import
from gvpo_offline.importing.settings import Columns
from gvpo_offline.store.arrow import rewards_to_table
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import RewardFamily
from gvpo_offline.store.schema import rewards_schema
from gvpo_offline.store.writer import publish, write_sidecar
from gvpo_offline.token_texts import TokenTexts
from gvpo_offline.tokenizer import load_tokenizer, tokenizer_info

PLAIN = Style(on=False)
EOS = "<eos> (id 2), the end of a turn in the chat template"
ESCAPES = "\x1b[31mred\x1b[0m \x9b2J \u202eevil\u202c a\u200bb \x07 \r."
SHOWN_ESCAPES = r"\x1b[31mred\x1b[0m \x9b2J \u202eevil\u202c a\u200bb \x07 \x0d."


def shown(dataset: Path | str, **settings: Any) -> str:
    """The output of `show` as text without styles."""
    return "\n".join(show_lines(ShowConfig(str(dataset), **settings), PLAIN))


def ids(*numbers: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(numbers, np.int32)


def chat_row(question: str, answer: str, score: float, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    return {"messages": messages, "answer": answer, "score": score, **fields}


def import_chats(folder: Path, rows: list[dict[str, Any]], tokenizer: Path, **more: Any) -> Path:
    """Import rows of `chat_row`; returns the dataset's folder."""
    columns = Columns(
        prompt="messages", response="answer", reward="score", truncated="cut", keep=["level"]
    )
    log = write_jsonl(folder / "log.jsonl", rows)
    data = folder / "data"
    settings = {"tokenizer_name_or_path": str(tokenizer), "columns": columns, **more}
    run_import(config(log, data, **settings))
    return data


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A dataset of two chats; one answer holds escape sequences, one is cut."""
    rows = [
        chat_row("2 + 3?", ESCAPES, 1.0, cut=False, level=3),
        chat_row("2 + 3?", "5", 0.5, cut=True, level=3),
        chat_row("Say hello.", "Hello!\nHello!", 1.0, cut=False, level=4),
        chat_row("Say hello.", "cat", 0.0, cut=False, level=4),
    ]
    return import_chats(tmp_path_factory.mktemp("chats"), rows, tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A dataset with masks, components of a reward, and a reference, of known tokens."""
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    a, b, c = tokenizer("abc", add_special_tokens=False).input_ids
    group = replace(
        make_group(0, k=2, scored=False),
        prompt_token_ids=ids(1, a),
        response_token_ids=(ids(a, b, c, 2), ids(c, 2)),
        loss_mask=(np.array([True, False, False, True]), np.array([True, True])),
        samplers=("good", "bad"),
        truncated=(False, True),
        rewards=np.array([0.75, -1.0]),
        ref_seq_logprobs=np.array([-3.0, -5.0]),
        sampler_seq_logprobs=np.array([-1.0, -2.0]),
        response_ids=("r0", "r1"),
        responses=None,
    )
    root = tmp_path_factory.mktemp("masked") / "data"
    build_dataset(root, groups=[group], tokenizer=tokenizer_info(tokenizer))
    return root


# ---- what is printed ----


def test_a_chat_is_printed_as_the_model_reads_it(chats: Path) -> None:
    text = shown(chats, where="metadata.level = 4", prompt_tokens=True)
    assert "version 1, 2 groups" in text
    assert "the dataset's fingerprint" in text
    assert "  source log.jsonl; 2 responses; prompt of " in text
    assert "  messages: system, user" in text
    assert "  metadata: level: 4" in text
    prompt = [
        "    | <|system|>↵",
        "    | Be brief.<eos>↵",
        "    | <|user|>↵",
        "    | Say hello.<eos>↵",
        "    | <|assistant|>↵",
    ]
    assert "\n".join(["  prompt", *prompt, "    tokens of the prompt:"]) in text
    # Added tokens have no quotes; <|system|> is the sixth of the tokenizer's special tokens.
    assert "      5 <|system|> | " in text
    assert "\n    | Hello!↵\n    | Hello!<eos>\n" in text
    assert " | 2 <eos>\n    ends with <eos> (id 2), the end of a turn in the chat template" in text
    assert "    reward reward@1: 1\n" in text
    assert "log-prob" not in text


def test_control_characters_are_printed_as_escapes(chats: Path) -> None:
    text = shown(chats, where="metadata.level = 3")
    assert f"    | {SHOWN_ESCAPES}<eos>\n" in text
    assert not set(text) & set("\x1b\x9b\u202e\u202c\u200b\x07\r")


def test_a_cut_response_has_no_end(chats: Path) -> None:
    text = shown(chats, where="metadata.level = 3")
    (line,) = (line for line in text.split("\n") if line.startswith("    cut: "))
    assert line.startswith("    cut: it is marked as truncated, and its last token '5' (id ")
    assert "; 1 token; truncated" in text


def test_masks_rewards_and_log_probs(masked: Path) -> None:
    """-3 nats over the 2 tokens that count are -1.5 per token."""
    text = shown(masked)
    assert "    sampler good; id r0; 4 tokens, of which 2 count\n" in text
    assert "    | a⟦bc⟧<eos>\n" in text
    assert "'a' | ⟦" in text
    assert "'c'⟧ | 2 <eos>" in text
    assert "    reward reward@1: 0.75\n" in text
    assert ": log-prob -3 nats, -1.5 per token\n" in text
    assert "    under its sampler: log-prob -1 nats, -0.5 per token\n" in text
    assert "    sampler bad; id r1; 2 tokens, all count; truncated\n" in text
    assert ": log-prob -5 nats, -2.5 per token\n" in text
    odd = "ends with <eos> (id 2), the end of a turn in the chat template, though it is marked as"
    assert odd in text


def test_components_and_every_reward_are_named(masked: Path, tmp_path: Path) -> None:
    """By default every reward and reference in its newest version; a chosen one alone; a
    combination as the weighted sum: 2 * 0.75 - 0.5 * 4 = -0.5.
    """
    data = tmp_path / "data"
    shutil.copytree(masked, data)
    manifest = open_dataset(data).manifest
    (base,) = manifest.groups
    values = [np.array([4.0, 8.0])], [np.array([[1.0, 2.0], [np.nan, 0.5]])]
    table = rewards_to_table(["group-00000"], *values)
    sidecar = write_sidecar(
        data, "rewards/style", "0", base, rewards_schema(components=True), [table]
    )
    style = RewardFamily(name="style", components=["clear", "kind"], files=[sidecar])
    other = reference_family([reference_sidecar(data, base, [scored_again()])], "other")
    changed = {
        "version": 2,
        "rewards": [*manifest.rewards, style],
        "references": [*manifest.references, other],
    }
    publish(data, lambda newest: manifest.model_copy(update=changed))
    text = shown(data)
    assert "    reward reward@1: 0.75\n    reward style@1: 4 (clear 1, kind none)\n" in text
    assert "    reward reward@1: -1\n    reward style@1: 8 (clear 2, kind 0.5)\n" in text
    assert f"    reference {other.fingerprint[:12]}: log-prob -7 nats, -3.5 per token\n" in text
    assert text.count("    reference ") == 4
    assert "    reward style@1: 4 (clear 1, kind none)\n    reference" in shown(
        data, reward="style"
    )
    weights = {"reward": 2.0, "style": -0.5}
    combined = shown(data, reward=weights, reference=other.fingerprint[:6])
    assert "    reward 2 * reward@1 + -0.5 * style@1: -0.5\n" in combined
    assert combined.count("    reference ") == 2
    assert shown(data, where="reward_gap > 0", reward="style")
    with pytest.raises(ConfigError, match="training needs one reward of the dataset"):
        shown(data, where="reward_gap > 0")
    with pytest.raises(ConfigError, match="log-probs of one reference"):
        shown(data, where="ARRAY_GET(ref_seq_logprobs, 1) < 0")
    (line,) = show_lines(ShowConfig(str(data), json=True), PLAIN)
    assert json.loads(line)["responses"][0]["components"]["style@1"] == {"clear": 1.0, "kind": None}


def scored_again() -> Group:
    """The group of `masked` as another reference scored it."""
    return make_group(
        0,
        k=2,
        response_token_ids=(ids(0, 0, 0, 0), ids(0, 0)),
        ref_seq_logprobs=np.array([-7.0, -9.0]),
    )


def test_ids_alone_without_a_tokenizer(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(2, k=2))
    run_import(config(log, tmp_path / "data", columns=Columns(**ID_COLUMNS)))
    text = shown(tmp_path / "data", group="g1")
    assert "tokenizer: the file does not say; tokenizer_name_or_path makes texts" in text
    assert "  prompt\n    | 1 3 3\n" in text  # [1, 2 + 1, 3 + 0]
    assert "    | 10 20 21 2\n    tokens: 10 | 20 | 21 | 2\n    the last token has id 2\n" in text


def test_long_texts_are_shortened_in_the_middle(tmp_path: Path) -> None:
    """500 tokens: the first and last 200, and 100 left out; of the response 8 tokens with ids."""
    group = make_group(
        0, k=2, prompt_tokens=500, response_tokens=450, scored=False, truncated=(False, False)
    )
    build_dataset(tmp_path / "data", groups=[group], reference=False)
    text = shown(tmp_path / "data", prompt_tokens=True)
    assert text.count("… 100 tokens are left out; --full prints them …") == 2
    assert text.count("… 50 tokens are left out; --full prints them …") == 2
    assert text.count(" | … 442 tokens … | ") == 2
    whole = shown(tmp_path / "data", prompt_tokens=True, full=True)
    assert "left out" not in whole
    numbers = group.response_token_ids[1].tolist()
    assert "    | " + " ".join(map(str, numbers)) in whole
    assert "    tokens: " + " | ".join(map(str, numbers)) in whole


def test_ordinary_tokens_that_spell_a_special_token_are_noted(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    spelled = [i for c in "<eos>" for i in tokenizer(c, add_special_tokens=False).input_ids]
    assert 2 not in spelled
    group = make_group(0, k=2, scored=False, truncated=(False, False))
    group = replace(group, response_token_ids=(ids(*spelled, 2), ids(2)))
    build_dataset(
        tmp_path / "data",
        groups=[group],
        reference=False,
        tokenizer=tokenizer_info(tokenizer),
    )
    text = shown(tmp_path / "data")
    assert "    | <eos><eos>\n    note: ordinary tokens spell <eos> here; it is not that" in text
    assert text.count("ordinary tokens spell") == 1


def test_styles_only_on_a_terminal(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With styles the text is the same, and every style ends on its line."""
    plain = shown(masked)
    assert "\x1b" not in plain
    styled = "\n".join(show_lines(ShowConfig(str(masked)), Style(on=True)))
    assert "\x1b[36m<eos>\x1b[0m" in styled  # an added token
    assert "⟦\x1b[2mbc\x1b[0m⟧" in styled  # tokens that do not count
    for code in ("\x1b[1m", "\x1b[2m", "\x1b[36m", "\x1b[0m"):
        styled = styled.replace(code, "")
    assert styled == plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_styles()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_styles()
    monkeypatch.setenv("NO_COLOR", "")
    assert has_styles()
    monkeypatch.setenv("TERM", "dumb")
    assert not has_styles()


def test_json_holds_everything(masked: Path, chats: Path) -> None:
    (line,) = show_lines(ShowConfig(str(masked), json=True), PLAIN)
    found = json.loads(line)
    first, second = found["responses"]
    assert found["group_id"] == "group-00000"
    assert found["metadata"] == {"level": 3}
    assert (first["text"], first["loss_mask"]) == ("abc<eos>", [True, False, False, True])
    assert (first["n_tokens"], first["n_counted"], first["sampler_seq_logprob"]) == (4, 2, -1.0)
    assert second["rewards"] == {"reward@1": -1.0}
    assert list(second["ref_seq_logprobs"].values()) == [-5.0]
    assert second["end"] == "the end of a turn in the chat template"
    lines = list(show_lines(ShowConfig(str(chats), json=True), PLAIN))
    assert len(lines) == 2
    assert all(line.isascii() and line.isprintable() for line in lines)
    texts = {r["text"] for line in lines for r in json.loads(line)["responses"]}
    assert f"{ESCAPES}<eos>" in texts


# ---- texts of tokens ----


def test_bytes_of_a_character_are_joined_in_texts_and_shown_in_lists(tmp_path: Path) -> None:
    """漢 is E6 BC A2 in UTF-8, one byte-level token each."""
    for make in (byte_level_tokenizer, metaspace_tokenizer):
        tokenizer = make(("<|im_end|>",), eos="<eos>")
        texts = TokenTexts(tokenizer, str(tmp_path))
        numbers = tokenizer("x漢 é\n", add_special_tokens=False).input_ids
        joined = b"".join(texts.token(number).content for number in numbers).decode()
        assert joined.lstrip(" ") == "x漢 é\n"
        parts = [texts.token(number).text for number in numbers]
        assert [p for p in parts if "<0x" in p][:3] == ["'<0xE6>'", "'<0xBC>'", "'<0xA2>'"]
        (span,) = texts.spans(ids(*numbers))
        assert span.text.lstrip(" ") == "x漢 é\n"
        assert texts.token(10**6).text == "<no token 1000000>"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, TokenTexts]]:
    """A byte-level tokenizer, and one that writes a space before each text."""
    empty = str(tmp_path_factory.mktemp("empty"))
    makers = (byte_level_tokenizer, metaspace_tokenizer)
    made = [make(("<|im_end|>",), eos="<eos>") for make in makers]
    return [(tokenizer, TokenTexts(tokenizer, empty)) for tokenizer in made]


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1))
def test_the_contents_of_tokens_make_the_text(
    text: str, tokenizers: list[tuple[Any, TokenTexts]]
) -> None:
    """The tokens of any text, joined, are its bytes, after the space that a tokenizer writes."""
    for (tokenizer, texts), space in zip(tokenizers, ("", " "), strict=True):
        numbers = tokenizer(text, add_special_tokens=False).input_ids
        joined = b"".join(texts.token(number).content for number in numbers)
        assert joined.decode() == space + text


def test_the_space_of_a_metaspace_token_is_shown(tmp_path: Path) -> None:
    """Decoders remove it at the beginning of a text, where the model still reads it."""
    tokenizer = metaspace_tokenizer((), eos="<eos>")
    texts = TokenTexts(tokenizer, str(tmp_path))
    cat = tokenizer.convert_tokens_to_ids("▁cat")
    assert cat != tokenizer.unk_token_id
    assert texts.token(cat).text == "' cat'"
    assert [span.text for span in texts.spans(ids(cat, cat))] == [" cat cat"]


def test_an_end_token_that_does_not_end_turns_is_said_to_be_one(tmp_path: Path) -> None:
    """The case of Gemma: the template ends turns with <end_of_turn>, eos_token is <eos>."""
    tokenizer = byte_level_tokenizer(("<end_of_turn>",), eos="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "<end_of_turn>")
    ends = TokenTexts(tokenizer, str(tmp_path)).ends
    eos, turn = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert ends == {
        eos: "the tokenizer's end token (the chat template ends a turn with <end_of_turn>, "
        f"id {turn})",
        turn: "the end of a turn in the chat template",
    }


# ---- which tokenizer ----


def test_a_tokenizer_that_is_gone_or_another_gives_ids_and_a_line(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    own = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer_dir, own)
    rows = [chat_row("2 + 3?", answer, 1.0, cut=False, level=1) for answer in ("5", "6")]
    data = import_chats(tmp_path, rows, own)
    assert "    | 5<eos>\n" in shown(data)
    (own / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    text = shown(data)
    assert "it is another one now, so only ids are shown (" in text
    assert "<eos>" not in text
    with pytest.raises(IntegrityError, match="uses the tokenizer and chat template of the dataset"):
        shown(data, tokenizer_name_or_path=str(own))
    assert "    | 5<eos>\n" in shown(data, tokenizer_name_or_path=str(tiny_tokenizer_dir))
    shutil.rmtree(own)
    assert "it cannot be loaded, so only ids are shown (" in shown(data)
    with pytest.raises(ConfigError, match="the tokenizer is a folder"):
        shown(data, tokenizer_name_or_path=str(own))


def test_the_chat_template_of_the_import_belongs_to_the_tokenizer(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(CHAT_TEMPLATE.replace("\n", " "))
    rows = [chat_row("2 + 3?", answer, 1.0, cut=False, level=1) for answer in ("5", "6")]
    data = import_chats(tmp_path, rows, tiny_tokenizer_dir, chat_template=str(template))
    assert "    | 5<eos>\n" in shown(data)
    moved = template.rename(tmp_path / "moved.jinja")
    assert "so only ids are shown" in shown(data)
    assert "    | 5<eos>\n" in shown(data, chat_template=str(moved))


# ---- which groups, and what is read for them ----


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, set[str]]]:
    """The row groups and columns of every read."""
    found: list[tuple[int, set[str]]] = []
    table = GroupDataset.table

    def recorded(self: GroupDataset, row_group: int, columns: Any) -> Any:
        read = table(self, row_group, columns)
        found.append((row_group, set(read.column_names)))
        return read

    monkeypatch.setattr(GroupDataset, "table", recorded)
    return found


def with_tokens(reads: list[tuple[int, set[str]]]) -> set[int]:
    return {row_group for row_group, columns in reads if "response_token_ids" in columns}


def test_only_the_row_groups_of_the_groups_are_read(
    tmp_path: Path, reads: list[tuple[int, set[str]]]
) -> None:
    """24 groups in row groups of 4: group 9 is row 1 of row group 2, and row 1 of its file."""
    data = tmp_path / "data"
    build_dataset(data, 24)
    reads.clear()
    text = shown(data, group="group-00009")
    assert with_tokens(reads) == {2}
    assert {frozenset(columns) for n, columns in reads if n < 2} == {frozenset(["group_id"])}
    assert max(number for number, _ in reads) == 2
    assert ", row 1 (from 0)" in text
    reads.clear()
    assert shown(data).count("\ngroup group-") == 3
    assert {number for number, _ in reads} == {0}
    reads.clear()
    assert shown(data, rows=6).count("\ngroup group-") == 6
    assert with_tokens(reads) == {0, 1}
    reads.clear()
    text = shown(data, where="group_id >= 'group-00010'", rows=3)
    names = [line for line in text.split("\n") if line.startswith("group ")]
    assert names == [f"group group-000{n}" for n in (10, 11, 12)]
    assert with_tokens(reads) == {2, 3}
    assert max(number for number, _ in reads) == 3  # the predicate stops as well
    reads.clear()
    next(iter(show_lines(ShowConfig(str(data), rows=24), PLAIN)))
    assert with_tokens(reads) == {0}  # printed as it is read


def test_the_beginning_of_an_id_is_enough_if_one_has_it(tmp_path: Path) -> None:
    build_dataset(tmp_path / "data", 24)
    with pytest.raises(ConfigError, match=r"with which 'group-00010', .* and others begin"):
        shown(tmp_path / "data", group="group-0001")
    with pytest.raises(ConfigError, match="'other', which is the id of none of 24 groups"):
        shown(tmp_path / "data", group="other")
    groups = [make_group(0, group_id="ab"), make_group(1, group_id="abc")]
    build_dataset(tmp_path / "two", groups=groups)
    assert "\ngroup ab\n" in shown(tmp_path / "two", group="ab")
    assert "\ngroup abc\n" in shown(tmp_path / "two", group="abc")


def test_wrong_choices_are_refused(tmp_path: Path) -> None:
    build_dataset(tmp_path / "data", 4)
    with pytest.raises(ConfigError, match="selects at least one group"):
        shown(tmp_path / "data", where="group_size > 99")
    with pytest.raises(ConfigError, match="either `group` or `where`"):
        shown(tmp_path / "data", where="group_size > 99", group="g")
    with pytest.raises(ConfigError, match="rows is positive"):
        shown(tmp_path / "data", rows=0)
    with pytest.raises(ConfigError, match="the dataset holds"):
        shown(tmp_path / "data", reward="other")
    with pytest.raises(ConfigError, match="log-probs of one reference"):
        shown(tmp_path / "data", reference="zzz")


def test_training_files_and_datasets_without_scores(tmp_path: Path) -> None:
    groups = make_groups(5)
    table = training_table(groups)
    path = tmp_path / "train.parquet"
    pq.write_table(table, path)
    text = shown(path, group="group-00003")
    assert "train.parquet, row 3 (from 0)" in text
    assert f"reward rewards@1: {groups[3].rewards[0]:.6g}" in text  # type: ignore[index]
    total = groups[3].ref_seq_logprobs[0]  # type: ignore[index]
    assert f"log-prob {total:.6g} nats, " in text
    pq.write_table(table.drop_columns(["rewards", "ref_seq_logprobs", "response_lengths"]), path)
    text = shown(path, where="group_size >= 2")
    assert "\ngroup group-00000\n" in text
    assert "reward " not in text
    with pytest.raises(ConfigError, match="needs a dataset with rewards"):
        shown(path, where="reward_gap > 0")
    bad = replace(groups[0], loss_mask=(np.array([True]),))
    pq.write_table(training_table([bad]), path)
    with pytest.raises(DataError, match="row 0, group 'group-00000'"):
        shown(path)


def test_a_dataset_at_a_url(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GVPO_OFFLINE_CACHE", str(tmp_path / "cache"))
    server = FolderServer(chats)
    try:
        remote = list(show_lines(ShowConfig(server.url, json=True), PLAIN))
    finally:
        server.close()
    local = list(show_lines(ShowConfig(str(chats), json=True), PLAIN))
    without = [{**json.loads(line), "file": ""} for line in local]
    assert [{**json.loads(line), "file": ""} for line in remote] == without


# ---- the command ----


def test_the_command(chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dataset without a flag, and flags with dashes."""
    assert cli.main(["show", str(chats), "--rows", "1", "--prompt-tokens"]) == 0
    out = capsys.readouterr().out
    assert "tokens of the prompt:" in out
    assert out.count("\ngroup ") == 1
    (group,) = (line[6:] for line in out.split("\n") if line.startswith("group "))
    assert cli.main(["show", "--dataset", str(chats), "--group", group, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["group_id"] == group
    for name in ("007", "1e5", "true"):  # not read as numbers or flags
        assert cli.main(["show", str(chats), "--group", name]) == 1
        assert f"received '{name}', which is the id of none" in capsys.readouterr().err
    assert cli.main(["show", str(chats), "more"]) == 1
    assert "unrecognized arguments: more" in capsys.readouterr().err
    assert cli.main(["show", str(chats), "--group", "none\x1b[2J"]) == 1
    captured = capsys.readouterr()
    assert r"received 'none\x1b[2J'" in captured.err
    assert captured.out == ""


def test_a_closed_pipe_ends_the_output(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed:
        encoding = "utf-8"

        def __init__(self) -> None:
            self.file = (tmp_path / "out").open("w")

        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return False

        def fileno(self) -> int:
            return self.file.fileno()

    closed = Closed()
    monkeypatch.setattr(sys, "stdout", closed)
    show(ShowConfig(str(chats)))
    os.write(closed.fileno(), b"dropped")
    closed.file.close()
    assert (tmp_path / "out").read_text() == ""


# ---- the end of an import ----


def test_an_import_ends_with_one_group_and_the_ends_of_responses(
    tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        chat_row("2 + 3?", answer, 1.0, cut=cut)
        for answer, cut in (("5", True), ("The answer is 5.", False), ("5.", False))
    ]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    argv = ["import", "--inputs", str(log), "--output_dir", str(tmp_path / "data")]
    argv += ["--tokenizer_name_or_path", str(tiny_tokenizer_dir), "--show_progress", "false"]
    argv += ["--columns.prompt", "messages", "--columns.response", "answer"]
    argv += ["--columns.reward", "score", "--columns.truncated", "cut"]
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("the first group as the model"))
    prompt = "<|system|>↵Be brief.<eos>↵<|user|>↵2 + 3?<eos>↵<|assistant|>↵"
    assert lines[at + 1] == f"  prompt    …{prompt[-60:]}"
    assert lines[at + 2] == "  response  The answer is 5.<eos>"
    assert lines[at + 3].startswith("  its end   … ")
    assert lines[at + 3].endswith(" '.' | 2 <eos>")
    assert lines[at + 4 : at + 6] == [
        f"each response that was not cut ends with {EOS}",
        "1 of 3 responses were cut, so they have no end token",
    ]
    assert lines[at + 6].startswith("to look at it in a browser: gvpo-offline report ")
    assert lines[at + 7].startswith("next: ")


def made(tmp_path: Path, tokenizer: Path | None, *responses: tuple[list[int], bool]) -> list[str]:
    """The last lines of an import whose only group has these responses."""
    group: Group = replace(
        make_group(0, k=len(responses), scored=False),
        response_token_ids=tuple(ids(*numbers) for numbers, _ in responses),
        truncated=tuple(cut for _, cut in responses),
    )
    info = None if tokenizer is None else tokenizer_info(load_tokenizer(str(tokenizer)))
    build_dataset(tmp_path / "data", groups=[group], reference=False, tokenizer=info)
    return made_lines(tmp_path / "data")[4:]


def test_mixed_ends_are_counted(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    found = made(
        tmp_path,
        tiny_tokenizer_dir,
        ([21, 2], False),
        ([22, 2], False),
        ([23, 21], False),
        ([24, 2], True),
        ([24, 25], True),
    )
    without = "1 of 3 responses that were not cut end without an end token, such as 21 '0': "
    assert found == [
        f"2 of 3 responses that were not cut end with {EOS}",
        f"{without}the policy does not learn to stop after them",
        "2 of 5 responses were cut; 1 of them ends with an end token all the same",
    ]


def test_no_response_ends(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    found = made(tmp_path, tiny_tokenizer_dir, ([21], False), ([22], False))
    assert len(found) == 1
    assert found[0].startswith("2 of 2 responses that were not cut end without an end token, such")


def test_ends_by_id_without_a_tokenizer(tmp_path: Path) -> None:
    assert made(tmp_path, None, ([21, 2], False), ([22, 2], False)) == [
        "each response ends with id 2"
    ]
