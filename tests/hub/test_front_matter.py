"""Cards that are there already, with front matter that cannot be read or is unusual."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.planted import clean_groups, write

from gvpo_offline.errors import ConfigError
from gvpo_offline.hub import card as dataset_card
from gvpo_offline.store.manifest import Manifest, load_manifest
from gvpo_offline.train.model_card import BEGIN, CARD, END, CardFacts, card_text, write_card

BROKEN = [
    "---\n: [\n---\n",
    "---\n- a list\n---\n",
    "---\na text\n---\n",
    "---\na: *unknown\n---\n",
    "---\nlicense: !!python/object:os.system x\n---\n",
]
FACTS = CardFacts(
    name="run",
    base="",
    adapter="",
    done={"objective": "`gvpo`"},
    datasets=[],
    evaluations=[],
    held_out=[""],
    saved_step=1,
    started_as_reference=True,
    settings={},
    from_command=True,
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return load_manifest(write(tmp_path_factory.mktemp("cards"), clean_groups(2)))


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.mark.parametrize("broken", [*BROKEN, "---\neval_results: x\nmodel_name: y\n---\n"])
def test_a_model_card_with_broken_front_matter_stays_and_saving_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    text = f"{broken}by hand\n{BEGIN}\nold\n{END}\n"
    (tmp_path / CARD).write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        write_card(tmp_path, FACTS, text)
    assert (tmp_path / CARD).read_text(encoding="utf-8") == text
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("gvpo_offline")]
    assert f"{tmp_path / CARD} was not written anew: its front matter" in said


@pytest.mark.parametrize("broken", BROKEN)
def test_a_push_names_a_card_with_broken_front_matter(manifest: Manifest, broken: str) -> None:
    with pytest.raises(ConfigError, match=r"datasets/me/x/README\.md: the front matter"):
        dataset_card.card(manifest, "me/x", broken)


@pytest.mark.parametrize(
    ("tags", "kept"),
    [("one", ["one"]), ("[a, [b]]", ["a", "['b']"]), ("5", ["5"]), ("[]", []), ("", [])],
)
def test_tags_of_other_types_are_kept_as_texts(
    manifest: Manifest, tags: str, kept: list[str]
) -> None:
    text = dataset_card.card(manifest, "me/x", f"---\nlicense: mit\ntags: {tags}\n---\n")
    assert front(text)["tags"] == [*kept, "gvpo", "offline-rl", "grouped-responses"]
    assert front(text)["license"] == "mit"


def test_several_base_models_of_a_person_are_kept() -> None:
    there = f"---\nbase_model: [a/b, c/d]\n---\n{BEGIN}\n{END}\n"
    assert front(card_text(FACTS, there))["base_model"] == ["a/b", "c/d"]
    there = f"---\nbase_model: /some/folder\n---\n{BEGIN}\n{END}\n"
    assert "base_model" not in front(card_text(FACTS, there))
