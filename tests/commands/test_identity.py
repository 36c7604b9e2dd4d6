"""Settings in identities: a setting that is added later does not invalidate earlier work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from support.builders import build_dataset
from support.importing import ID_COLUMNS, config, id_rows, write_jsonl

from gvpo_offline.errors import DataError, ResumeError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.identity import identity_settings
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns, ImportConfig
from gvpo_offline.merging.settings import CompactConfig, MergeConfig
from gvpo_offline.merging.stages import compact
from gvpo_offline.rewards.kinds import NumericSettings, ScorerSettings
from gvpo_offline.rewards.scorer import settings_of
from gvpo_offline.sampling.settings import sampler_settings
from gvpo_offline.train.checkpoint import begin_checkpoint, check_identity, seal_checkpoint
from gvpo_offline.train.identity import adapter_defaults, model_identity
from gvpo_offline.train.objective import Objective

STORED = json.loads((Path(__file__).parents[1] / "data" / "before" / "identities.json").read_text())


def _import_config(values: dict[str, Any]) -> ImportConfig:
    return ImportConfig(**{**values, "columns": Columns(**values["columns"])})


CLASSES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "import": _import_config,
    "merge": lambda values: MergeConfig(**values),
    "compact": lambda values: CompactConfig(**values),
    "objective": lambda values: Objective(**values),
}


def scorer(kind: str, **values: Any) -> Any:
    return TypeAdapter(ScorerSettings).validate_python({"kind": kind, **values})


@pytest.mark.parametrize("name", CLASSES)
def test_the_identity_is_that_of_849c9a7(name: str) -> None:
    """The expected hashes were computed in that commit, over all fields."""
    settings = CLASSES[name](STORED["settings"][name])
    assert sha256_json(identity_settings(settings)) == STORED["sha256"][name]


@pytest.mark.parametrize("kind", STORED["settings"]["sampler"])
def test_a_samplers_identity_is_that_of_849c9a7(kind: str) -> None:
    settings = sampler_settings("s", {"kind": kind, **STORED["settings"]["sampler"][kind]})
    assert sha256_json(settings.identity()) == STORED["sha256"]["sampler"][kind]


@pytest.mark.parametrize("kind", STORED["settings"]["scorer"])
def test_a_scorers_identity_is_that_of_849c9a7(kind: str) -> None:
    settings = scorer(kind, **STORED["settings"]["scorer"][kind])
    assert sha256_json(settings_of(settings)) == STORED["sha256"]["scorer"][kind]


def with_added(settings: Any, value: int) -> Any:
    """The same settings in a class with one more field, whose default is 3."""
    before = type(settings)
    frozen = before.__dataclass_params__.frozen
    added = [("added", int, 3)]
    kind = make_dataclass("Later", added, bases=(before,), kw_only=True, frozen=frozen)
    own = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return kind(**own, added=value)


@pytest.mark.parametrize("name", CLASSES)
def test_an_added_setting_enters_where_it_is_not_at_its_default(name: str) -> None:
    settings = CLASSES[name](STORED["settings"][name])
    assert identity_settings(with_added(settings, 3)) == identity_settings(settings)
    assert identity_settings(with_added(settings, 4)) == {**identity_settings(settings), "added": 4}


def test_an_added_setting_of_the_columns_enters_likewise() -> None:
    """The same rule holds for a nested dataclass."""
    settings = _import_config(STORED["settings"]["import"])
    for value, entered in ((3, {}), (4, {"added": 4})):
        later = replace(settings, columns=with_added(settings.columns, value))
        expected = identity_settings(settings)
        assert identity_settings(later) == {
            **expected,
            "columns": {**expected["columns"], **entered},
        }


def test_every_setting_of_before_enters_at_its_default_and_changed() -> None:
    plain, changed = Objective(0.5), Objective(0.5, anchor=0.25)
    assert identity_settings(plain)["anchor"] == 0.0
    assert identity_settings(changed) == {**identity_settings(plain), "anchor": 0.25}


def test_an_added_setting_of_a_scorer_enters_where_it_is_not_at_its_default() -> None:
    class Later(NumericSettings):
        added: int = 3

    own = {"kind": "numeric", "column": "answer"}
    before = settings_of(scorer(**own))
    assert settings_of(Later.model_validate(own)) == before
    assert settings_of(Later.model_validate({**own, "added": 4})) == {**before, "added": 4}


def test_a_removed_setting_stays_at_the_value_that_it_had() -> None:
    """With `anchor` removed, the identity is the same as with it."""

    class Shorter:
        retired_settings = {"anchor": 0.0}  # noqa: RUF012
        always_in_identity = "beta loss_type response_weights"

    kept = [("beta", float), ("loss_type", str, "gvpo"), ("response_weights", str, "equal")]
    kind = make_dataclass("Kept", kept, bases=(Shorter,))
    assert identity_settings(kind(0.5)) == identity_settings(Objective(0.5))


def test_an_import_of_before_a_setting_is_found_done(tmp_path: Path) -> None:
    """The stage itself: with the setting at its default the dataset is there already; with another
    value the folder holds another import.
    """
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(4))
    settings = config(log, tmp_path / "out", columns=Columns(**ID_COLUMNS))
    assert not import_log(settings).already_imported
    assert import_log(with_added(settings, 3)).already_imported
    with pytest.raises(DataError, match="other inputs or with other settings"):
        import_log(with_added(settings, 4))


def test_a_compaction_of_before_a_setting_is_found_done(tmp_path: Path) -> None:
    """Its lineage step lacks the setting, and so had the default."""
    build_dataset(tmp_path / "data", 8, groups_per_shard=2)
    settings = CompactConfig(str(tmp_path / "data"), show_progress=False)
    assert compact(settings).changed
    assert not compact(with_added(settings, 3)).changed


def test_a_checkpoint_without_a_setting_had_its_default(tmp_path: Path) -> None:
    """Such as settings that PEFT adds to adapters. The version of PEFT does not matter."""
    folder = tmp_path / "checkpoint-1"
    begin_checkpoint(folder)
    seal_checkpoint(
        folder, 1, {"model": {"adapter.default.r": "4", "adapter.default.peft_version": "1"}}
    )
    defaults = {"model": {"adapter.default.added": "None", "adapter.default.r": "8"}}

    def now(added: str) -> dict[str, dict[str, Any]]:
        own = {"adapter.default.r": "4", "adapter.default.added": added}
        return {"model": {**own, "adapter.default.peft_version": "2"}}

    check_identity(folder, now("None"), defaults)
    with pytest.raises(ResumeError, match="added: 'None' then, '5' now"):
        check_identity(folder, now("5"), defaults)
    with pytest.raises(ResumeError, match="added: None then, 'None' now"):
        check_identity(folder, now("None"))


def test_each_setting_of_an_adapter_has_its_default_beside_it(tiny_model_dir: Path) -> None:
    """The names are the same, so that a setting that a checkpoint lacks has the default."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    own = {n: v for n, v in model_identity(model).items() if n.startswith("adapter.")}
    defaults = adapter_defaults(model)["model"]
    assert own.keys() <= defaults.keys()
    assert (own["adapter.default.r"], defaults["adapter.default.r"]) == ("4", "8")
