"""The card of a saved model: what it says, what it keeps, and what cannot break out of it."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from support.training import scored_dataset, train_command, trainer_of

from gvpo_offline import GVPOConfig
from gvpo_offline.cli import _parse, main
from gvpo_offline.commands.table import COMMANDS
from gvpo_offline.errors import StorageError
from gvpo_offline.hub.markdown import block, code
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.model_card import BEGIN, END, CardDataset, CardFacts, card_text, write_card
from gvpo_offline.version import __version__


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("card") / "data", tiny_model_dir, 16)


def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])


def card_of(folder: Path) -> ModelCard:
    """The card as the hub's client reads it; its front matter survives a round trip."""
    found = ModelCard.load(folder / "README.md")
    assert isinstance(found.data, ModelCardData)
    assert yaml.safe_load(found.data.to_yaml()) == found.data.to_dict()
    return found


def fenced(text: str, language: str) -> str:
    found = re.search(rf"^(`{{3,}}){language}\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[2]


def facts(**changes: Any) -> CardFacts:
    held = CardDataset("data", 1, "0" * 64, 3, 1, ["base"], ["right@1"])
    made = CardFacts(
        name="run",
        base="org/base",
        adapter="",
        done={"β": "0.1"},
        datasets=[held],
        evaluations=[],
        held_out=[""],
        saved_step=2,
        started_as_reference=True,
        settings={"beta": 0.1},
        from_command=True,
    )
    return replace(made, **changes)


# ---- what it says ----


def test_a_run_of_the_command_says_what_was_done_and_can_be_done_again(
    tmp_path: Path, dataset: GroupDataset, tiny_model_dir: Path
) -> None:
    """The settings of the card, read by the command line, are those of the run."""
    run = tmp_path / "run"
    argv = train_command(
        dataset, tiny_model_dir, run, eval_on_start="true", imitation=1, groups_per_step=8
    )
    assert main(argv) == 0
    card = card_of(run)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"gvpo", "gvpo-offline"} <= set(card.data.tags or [])
    assert card.data.base_model is None  # a folder: the hub would refuse it
    assert card.data.license is None
    text = card.text
    reference = dataset.manifest.references[0]
    for said in (
        "| β | 0.5 |",
        "| imitation | 1 of `best` |",
        f"(`{reference.fingerprint[:12]}`), the policy before training",
        "| length | 2 of 2 steps of 8 groups each, 1 epochs |",
        f"gvpo_offline {__version__}",
        f"| dataset | `{dataset.root}` |",
        f"`{dataset.fingerprint[:12]}`",
        "| groups | 16 trained on, 16 held out |",
        "## Licence",
        "Not stated.",
    ):
        assert said in text, said
    assert "unknown dataset" not in text
    assert all(f"`{sampler}" in text for sampler in dataset.manifest.samplers)
    # Held-out figures: at the start, where the policy is the reference, and at the end.
    row = next(line for line in text.splitlines() if "`explained_variance`" in line)
    _, _, before, after, _, _ = (cell.strip() for cell in row.split("|"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line["eval_explained_variance"] for line in lines if "eval_loss" in line]
    assert [before, after] == [f"{logged[0]:.4g}", f"{logged[-1]:.4g}"]
    assert abs(float(before)) < 1e-3
    assert "| metric | step 0 | step 2 (saved) | meaning |" in text

    file = tmp_path / "train.yaml"
    file.write_text(fenced(text, "yaml"))
    again = _parse("train", COMMANDS["train"], ["--config", str(file)])
    first = _parse("train", COMMANDS["train"], argv[1:])
    assert again == first


def test_an_adapter_has_our_card_and_the_fields_of_peft(
    tmp_path: Path, dataset: GroupDataset, tiny_model_dir: Path
) -> None:
    trainer = trainer_of(
        tiny_model_dir, dataset, tmp_path / "run", peft_config=adapter(), save_strategy="epoch"
    )
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        card = card_of(folder)
        assert card.data.library_name == "peft"
        assert "lora" in (card.data.tags or [])
        assert card.data.base_model is None
        assert card.text.count(BEGIN) == 1
        assert f"An adapter (`LORA`) of `{tiny_model_dir}`" in card.text
        assert "Model Card for Model ID" not in card.text
        assert "AutoPeftModelForCausalLM" in card.text
        assert "None were evaluated" in card.text
        assert "It was trained from Python" in card.text
        settings = yaml.safe_load(fenced(card.text, "yaml"))
        assert settings["beta"] == 0.5
        GVPOConfig(**settings)


def test_push_to_hub_writes_the_same_card(
    tmp_path: Path, dataset: GroupDataset, tiny_model_dir: Path
) -> None:
    """`Trainer.push_to_hub` calls `create_model_card` with the arguments that it was given."""
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path / "run")
    trainer.create_model_card(model_name="mine", license="mit", tags="plans", language="de")
    card = card_of(tmp_path / "run")
    assert "# `mine`" in card.text
    assert (card.data.license, card.data.language) == ("mit", "de")
    assert "plans" in (card.data.tags or [])
    assert "trained from scratch" not in card.text
    trainer.create_model_card()
    assert card_of(tmp_path / "run").data.license == "mit"  # as it was given before


def test_no_secret_is_in_the_card(
    tmp_path: Path, dataset: GroupDataset, tiny_model_dir: Path
) -> None:
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path / "run", hub_token="hf_very_secret")
    trainer.create_model_card()
    assert "hf_very_secret" not in (tmp_path / "run" / "README.md").read_text()


def test_the_figures_of_the_saved_weights_are_told_apart() -> None:
    """The best of 4 evaluations is loaded: the first, that one and the last are shown."""
    lines = [
        {
            "step": step,
            "explained_variance": 0.1 * step,
            "sampled_reward": 0.5,
            "sampled_reward_se": 0.02,
        }
        for step in (0, 2, 4, 6)
    ]
    text = card_text(facts(evaluations=lines, saved_step=4))
    assert "| metric | step 0 | step 4 (saved) | step 6 | meaning |" in text
    assert "| `explained_variance` | 0 | 0.4 | 0.6 |" in text
    assert "| `sampled_reward` | 0.5 ± 0.02 | 0.5 ± 0.02 | 0.5 ± 0.02 |" in text


def test_several_held_out_datasets_have_their_own_rows() -> None:
    lines = {"step": 2, "math_loss": 1.0, "chat_loss": 2.0, "other_loss": 3.0}
    text = card_text(facts(evaluations=[lines], held_out=["math", "chat"]))
    assert "| `math_loss` | 1 |" in text
    assert "| `chat_loss` | 2 |" in text
    assert "other_loss" not in text


def test_a_base_model_of_the_hub_is_named_for_the_hub(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card_text(facts()))
    assert card_of(tmp_path).data.base_model == "org/base"


# ---- what it keeps ----

OWN = "---\nlicense: apache-2.0\n---\n\n# My plans\r\n\nWritten by hand.\n"


@pytest.mark.parametrize("adapted", [False, True])
def test_a_card_that_a_person_wrote_stays_byte_by_byte(
    tmp_path: Path, dataset: GroupDataset, tiny_model_dir: Path, adapted: bool
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "README.md").write_bytes(OWN.encode())
    trainer = trainer_of(
        tiny_model_dir, dataset, run, peft_config=adapter() if adapted else None, max_steps=1
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert (run / "README.md").read_bytes() == OWN.encode()
    assert not list(run.glob(".README*"))


def test_text_around_the_marks_and_other_fields_stay(tmp_path: Path) -> None:
    first = card_text(facts())
    edited = first.replace("library_name:", "license: mit\nlibrary_name:", 1).replace(
        BEGIN, f"Read this first.\n\n{BEGIN}"
    )
    (tmp_path / "README.md").write_text(f"{edited}\nAnd this last.\n")
    before = (tmp_path / "README.md").read_text()
    write_card(tmp_path, facts(saved_step=9, done={"β": "0.7"}), before)
    card = card_of(tmp_path)
    assert card.data.license == "mit"
    assert card.text.index("Read this first.") < card.text.index(BEGIN)
    assert card.text.index("And this last.") > card.text.index(END)
    assert "| β | 0.7 |" in card.text
    assert "| β | 0.1 |" not in card.text
    write_card(
        tmp_path, facts(saved_step=9, done={"β": "0.7"}), (tmp_path / "README.md").read_text()
    )
    assert card_of(tmp_path).text == card.text


TEMPLATES = {
    "transformers": "<!-- This model card has been generated automatically according to the "
    "information the Trainer had access to. -->\n\ntrained from scratch on an unknown dataset.",
    "peft": "---\nbase_model: /tmp/x\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n\n…",
}


@pytest.mark.parametrize("library", TEMPLATES)
def test_the_templates_of_other_libraries_are_replaced(tmp_path: Path, library: str) -> None:
    template = TEMPLATES[library]
    (tmp_path / "README.md").write_text(template)
    write_card(tmp_path, facts(base=""), template)
    card = card_of(tmp_path)
    assert "unknown dataset" not in card.text
    assert "Model Card for Model ID" not in card.text
    assert card.data.base_model is None
    assert card.text.count(BEGIN) == 1


# ---- hostile text ----

HOSTILE = [
    "<script>alert(1)</script>",
    "![x](http://example.org/track.png)",
    "a | b\n| c | d |\n\n# heading",
    "```\n<b>out</b>\n```",
    f"x {END} <img src=x onerror=alert(1)>",
    "---\nlicense: stolen\n---",
    "\x1b[31mred\x1b[0m \u202e backwards",
    "`` ` ``",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_never_become_markup(tmp_path: Path, text: str) -> None:
    """Every name of a log may be hostile: it stands in a code span or block, on its line."""
    from markdown_it import MarkdownIt

    held = CardDataset(text, 1, text, 3, 1, [text], [text], {"where": text})
    given = facts(
        name=text,
        base=text,
        datasets=[held],
        adapter=text,
        settings={"dataset": text, "samplers": [text, text * 2]},
        done={"reference": code(text)},
        data={"tags": [text], "license": text},
    )
    (tmp_path / "README.md").write_text(card_text(given), encoding="utf-8")
    card = card_of(tmp_path)
    assert card.data.license == (text or None) or card.data.license == text
    assert card.text.count(BEGIN) == card.text.count(END) == 1
    assert "\x1b" not in card.text
    assert "\u202e" not in card.text
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    kinds = {child.type for token in tokens for child in token.children or []}
    assert not kinds & {"html_inline", "image"}
    blocks = [token for token in tokens if token.type == "html_block"]
    assert [block.content.strip() for block in blocks] == [BEGIN, END]
    links = [
        child.attrs["href"]
        for token in tokens
        for child in token.children or []
        if child.type == "link_open"
    ]
    assert links == ["https://arxiv.org/abs/2504.19599"]
    headings = [t.content for n, t in enumerate(tokens) if tokens[n - 1].type == "heading_open"]
    assert len(headings) == 7
    if "<!--" not in text and text.isprintable():
        assert yaml.safe_load(fenced(card.text, "yaml"))["dataset"] == text


def test_fences_are_longer_than_those_of_the_text() -> None:
    assert code("a`b") == "`` a`b ``"
    assert block("```\nx\n```")[0] == "````"


# ---- folders that cannot take a card ----


def test_a_readme_that_is_a_folder_is_said_before_the_first_step(
    tmp_path: Path, dataset: GroupDataset, tiny_model_dir: Path
) -> None:
    run = tmp_path / "run"
    (run / "README.md").mkdir(parents=True)
    trainer = trainer_of(tiny_model_dir, dataset, run)
    with pytest.raises(StorageError, match=r"README\.md of the folder where a model is saved"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_readme_that_is_no_text_is_said(tmp_path: Path) -> None:
    from gvpo_offline.train.model_card import read_card

    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StorageError, match=r"a file of text, or absent.*UnicodeDecodeError"):
        read_card(tmp_path)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "room on the disk"),
        (errno.EACCES, "the right to read"),
        (errno.E2BIG, r"README\.md can be written"),
    ],
)
def test_a_card_that_cannot_be_written_names_it_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    write_card(tmp_path, facts(), None)
    before = (tmp_path / "README.md").read_text()

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StorageError, match=message) as error:
        write_card(tmp_path, facts(saved_step=5), before)
    assert error.value.file == str(tmp_path / "README.md")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == before
