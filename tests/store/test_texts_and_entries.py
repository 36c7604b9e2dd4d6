"""Manifests, run files and settings with text that no file can hold, or with files said twice."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.builders import build_dataset

from gvpo_offline.cli import main
from gvpo_offline.errors import ConfigError, IntegrityError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.hub.card import card
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.json_text import escaped_surrogates, has_surrogates, is_storable
from gvpo_offline.store.commit import read_record
from gvpo_offline.store.manifest import load_manifest
from gvpo_offline.train.run_folder import read_metrics

LONE = "\ud800"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with a reward and reference log-probs."""
    return build_dataset(tmp_path_factory.mktemp("whole") / "data").root


def content_of(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "manifest-000001.json").read_text())["manifest"]
    return found


def reseal(root: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps({"sha256": sha256_json(manifest), "manifest": manifest})
    (root / "manifest-000001.json").write_text(text)


@pytest.mark.parametrize("place", ["reward", "sampler", "lineage"])
def test_half_of_a_surrogate_pair_in_a_manifest_is_refused_where_it_is_read(
    whole: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next version could not be written: UTF-8 has no bytes for it."""
    root = Path(shutil.copytree(whole, tmp_path / "data"))
    manifest = content_of(root)
    if place == "reward":
        manifest["rewards"][0]["name"] = LONE
    elif place == "sampler":
        manifest["samplers"][LONE] = {}
    else:
        manifest["lineage"] = [{"stage": "a", "package_version": "1", "config": {"x": [LONE]}}]
    reseal(root, manifest)
    with pytest.raises(IntegrityError, match="half of a surrogate pair"):
        load_manifest(root)
    for argv in (["ls", str(root)], ["compact", "--dataset", str(root)]):
        assert main(argv) == 1
        assert "half of a surrogate pair" in capsys.readouterr().err


def test_a_whole_pair_is_text(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "data"))
    manifest = content_of(root)
    manifest["samplers"]["\U0001f600"] = {}
    reseal(root, manifest)  # as \ud83d\ude00
    assert "\U0001f600" in load_manifest(root).samplers


def test_half_of_a_pair_in_a_commit_record_is_refused(whole: Path, tmp_path: Path) -> None:
    path = next(whole.glob("commits/*/*.json"))
    record = json.loads(path.read_text())["record"]
    record["details"] = {"left_out": {LONE: 1}}
    (tmp_path / path.name).write_text(json.dumps({"sha256": sha256_json(record), "record": record}))
    with pytest.raises(IntegrityError, match="half of a surrogate pair"):
        read_record(tmp_path / path.name)


def test_half_of_a_pair_in_a_metric_is_an_escape(tmp_path: Path) -> None:
    """A warning may hold a file name that is not UTF-8, so such lines stay readable."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a\\ud800": 2, "b": "\\udcff"}\n')
    found = read_metrics(tmp_path)
    assert found.to_dicts() == [{"step": 1, "epoch": None, "a\\ud800": 2, "b": "\\udcff"}]


def test_escapes_are_found_and_written_in_every_part() -> None:
    value = {"a\ud800": ["\udfff", {"b": "\U0001f600é"}], "c": 1}
    assert has_surrogates(json.dumps(value).encode(), value)
    escaped = {"a\\ud800": ["\\udfff", {"b": "\U0001f600é"}], "c": 1}
    assert escaped_surrogates(value) == escaped
    assert not has_surrogates(json.dumps(escaped).encode(), escaped)


def test_a_file_with_two_sayings_is_refused(whole: Path, tmp_path: Path) -> None:
    """The first groups file, and a sidecar under its path with another hash."""
    root = Path(shutil.copytree(whole, tmp_path / "data"))
    manifest = content_of(root)
    groups = manifest["groups"][0]
    manifest["rewards"][0]["files"][0]["file"]["path"] = groups["path"]
    reseal(root, manifest)
    with pytest.raises(IntegrityError, match=f"two hashes or sizes of {groups['path']}"):
        load_manifest(root)


def test_two_sidecars_of_a_groups_file_are_refused(whole: Path, tmp_path: Path) -> None:
    """Otherwise the last one would count, without a word."""
    root = Path(shutil.copytree(whole, tmp_path / "data"))
    manifest = content_of(root)
    first, second, *_ = manifest["rewards"][0]["files"]
    manifest["rewards"][0]["files"].append({**second, "base_sha256": first["base_sha256"]})
    reseal(root, manifest)
    with pytest.raises(IntegrityError, match="two sidecars of one groups file"):
        load_manifest(root)


def test_a_card_of_a_reward_without_a_sidecar_is_refused(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "data"))
    manifest = content_of(root)
    del manifest["rewards"][0]["files"][0]
    reseal(root, manifest)
    with pytest.raises(IntegrityError, match=f"none for {manifest['groups'][0]['path']}"):
        card(load_manifest(root), "a/b", None, [])


def test_a_setting_with_a_null_character_is_an_error_of_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parser tries a text for a mapping as the path of a file."""
    (tmp_path / "c.yaml").write_text('{"inputs": ["a"], "output_dir": "b", "columns": "\\0"}')
    assert main(["import", "--config", str(tmp_path / "c.yaml")]) == 1
    assert "settings of the command, with values of the right type" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["an input", "the output"])
def test_names_of_other_bytes_than_utf8_are_refused(
    tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arrow opens no such file, and no manifest can name it. Nothing is written."""
    odd, plain = tmp_path / os.fsdecode(b"l\xff.jsonl"), tmp_path / "l.jsonl"
    log = odd if where != "the output" else plain
    log.write_text('{"prompt": "a", "response": "b", "reward": 1}\n')
    output = tmp_path / (os.fsdecode(b"o\xff") if where == "the output" else "out")
    settings = ["--output_dir", str(output), "--tokenizer_name_or_path", "none"]
    assert main(["import", "--inputs", str(log), *settings]) == 1
    assert "UTF-8" in capsys.readouterr().err
    assert not output.exists()


def test_a_name_that_a_pattern_matches_is_refused_as_well(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"l\xff.jsonl")).write_text("{}\n")
    with pytest.raises(ConfigError, match="the name of an input is text in UTF-8"):
        find_sources([str(tmp_path / "*.jsonl")])


def test_what_utf8_stores() -> None:
    assert is_storable({"é": ["\U0001f600", 1.5, None, float("nan"), ("?", "\ufffd")]})
    for value in (LONE, {LONE: 1}, ["a", (LONE,)], {"a": {"b": [LONE]}}):
        assert not is_storable(value)
