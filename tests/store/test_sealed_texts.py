"""Texts of sealed files become names of columns, folders and files: each has a form in UTF-8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.builders import build_dataset

from gvpo_offline.cli import main
from gvpo_offline.errors import IntegrityError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.manifest import load_manifest


def renamed(root: Path, name: str) -> None:
    """Give the reward of a dataset another name, and seal the manifest with escapes in ASCII."""
    path = root / "manifest-000001.json"
    content: dict[str, Any] = json.loads(path.read_text())["manifest"]
    content["rewards"][0]["name"] = name
    sealed = {"sha256": sha256_json(content), "manifest": content}
    path.write_text(json.dumps(sealed, ensure_ascii=True))


@pytest.mark.parametrize("name", ["\ud800", "a\udfff", "\udc00\ud800"])
def test_a_manifest_with_a_lone_surrogate_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    build_dataset(tmp_path, 8)
    renamed(tmp_path, name)
    with pytest.raises(IntegrityError, match="surrogates not allowed"):
        load_manifest(tmp_path)
    assert main(["compact", "--dataset", str(tmp_path), "--show_progress", "false"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    build_dataset(tmp_path, 8)
    renamed(tmp_path, "\U0001f600")
    text = (tmp_path / "manifest-000001.json").read_text()
    assert "\\ud83d\\ude00" in text
    assert open_dataset(tmp_path).manifest.rewards[0].name == "\U0001f600"


def test_a_manifest_is_in_utf_8(tmp_path: Path) -> None:
    """Python's parser of JSON would take the bytes of a lone surrogate, and UTF-16."""
    build_dataset(tmp_path, 8)
    path = tmp_path / "manifest-000001.json"
    text = path.read_text()
    path.write_text(text, encoding="utf-8-sig")
    assert open_dataset(tmp_path).n_groups == 8
    for data in (text.encode("utf-16"), text.encode().replace(b"reward", b"rew\xed\xa0\x80", 1)):
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match="codec can't decode"):
            load_manifest(tmp_path)
