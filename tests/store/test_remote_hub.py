"""A dataset on the Hugging Face Hub, read where it lies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.builders import build_dataset

hub_server = pytest.importorskip("support.hub_server")

READER = """
import json, sys
from gvpo_offline import RemoteSettings, open_dataset
dataset = open_dataset(sys.argv[1], remote=RemoteSettings(cache_dir=sys.argv[2], attempts=2))
dataset.verify()
groups = [group for n in range(dataset.n_row_groups) for group in dataset.groups(n)]
found = {group.group_id: [ids.tolist() for ids in group.response_token_ids] for group in groups}
print(json.dumps({"groups": found, "fetched": dataset.storage.traffic.fetched_bytes}))
"""


def test_the_hub_is_read_by_ranges(tmp_path: Path) -> None:
    local = build_dataset(tmp_path / "data", 16, response_tokens=60)
    root = tmp_path / "data"
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    hub = hub_server.HubServer()
    try:
        hub.put("someone/maths", files)
        url = "hf://datasets/someone/maths@main"
        done = subprocess.run(
            [sys.executable, "-c", READER, url, str(tmp_path / "cache")],
            env={**os.environ, **hub.environment(tmp_path / "home")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    finally:
        hub.close()
    found = json.loads(done.stdout)
    groups = [group for n in range(local.n_row_groups) for group in local.groups(n)]
    assert found["groups"] == {
        g.group_id: [ids.tolist() for ids in g.response_token_ids] for g in groups
    }
    # No read-ahead of the file system's: less than the files and their footers once.
    assert found["fetched"] < 2 * sum(len(content) for content in files.values())
