"""A reference that is scored for a dataset in a bucket, and a run that trains from there."""

from __future__ import annotations

import json
from pathlib import Path

from support.bucket_servers import Bucket
from support.builders import same_group
from support.remote_servers import serving
from support.training import unscored_dataset

from gvpo_offline import open_dataset
from gvpo_offline.cli import main


def test_the_reference_stage_on_a_dataset_in_a_bucket(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The log-probs are those of a local run: the same fingerprint, the same files."""
    local = tmp_path / "local"
    unscored_dataset(local, tiny_model_dir)
    scored = ["--model_name_or_path", str(tiny_model_dir), "--use_cpu", "true"]
    with serving(Bucket()) as bucket:
        url = bucket.upload(local, "scored")
        file = tmp_path / "bucket.yaml"
        remote = {"storage_options": bucket.options, "timeout": 10}
        file.write_text(json.dumps({"remote": remote, "spool_dir": str(tmp_path / "spool")}))
        assert main(["reference", "--dataset", url, "--config", str(file), *scored]) == 0
        assert main(["reference", "--dataset", str(local), *scored]) == 0
        here = open_dataset(local, join=("reference",))
        there = open_dataset(url, join=("reference",), remote=bucket.settings(tmp_path / "cache"))
        assert there.manifest.references == here.manifest.references
        for number in range(here.n_row_groups):
            pairs = zip(there.groups(number), here.groups(number), strict=True)
            assert all(same_group(one, other) for one, other in pairs)
