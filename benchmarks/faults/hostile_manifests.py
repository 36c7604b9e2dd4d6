"""Hostile datasets: manifests with a right seal that say what no stage writes, and hostile folders.

A change takes the folder of a dataset and the canary's.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import oracles

Change = Callable[[Path, Path], None]
_ESCAPE = "\x1b]0;owned\x07\x1b[31mred"
_SURROGATE = "\ud800"


def newest(root: Path) -> Path:
    """The newest manifest."""
    return max(root.glob("manifest-*.json"))


def resealed(change: Callable[[dict[str, Any], Path], None]) -> Change:
    """A change of the newest manifest's content, with the seal that belongs to it."""

    def apply(root: Path, canary: Path) -> None:
        path = newest(root)
        content = json.loads(path.read_bytes())["manifest"]
        change(content, canary)
        path.write_text(oracles.sealed("manifest", content))

    return apply


def _extra(named: Callable[[Path], str]) -> Change:
    """A groups file of the canary's, as a further one of the dataset."""

    def change(content: dict[str, Any], canary: Path) -> None:
        entry = copy.deepcopy(content["groups"][0])
        victim = canary / "victim.parquet"
        entry.update(path=named(canary), sha256=oracles.sha256(victim), bytes=victim.stat().st_size)
        content["groups"].append(entry)

    return resealed(change)


def _moved(named: Callable[[Path], str], family: str) -> Change:
    """A file of the dataset under the name of one outside."""

    def change(content: dict[str, Any], canary: Path) -> None:
        if family == "groups":
            content["groups"][0]["path"] = named(canary)
        else:
            content[family][0]["files"][0]["file"]["path"] = named(canary)

    return resealed(change)


def _set(path: str, value: Any) -> Change:
    def change(content: dict[str, Any], canary: Path) -> None:
        *parents, name = path.split(".")
        holder: Any = content
        for key in parents:
            holder = holder[int(key) if key.isdigit() else key]
        holder[int(name) if name.isdigit() else name] = value

    return resealed(change)


def _rename(path: str, name: str) -> Change:
    """Rename the first key of a mapping."""

    def change(content: dict[str, Any], canary: Path) -> None:
        content[path] = {name: next(iter(content[path].values()))}

    return resealed(change)


def _absolute(canary: Path) -> str:
    return str(canary / "victim.parquet")


def _above(canary: Path) -> str:
    return "../../outside/victim.parquet"


def _text(canary: Path) -> str:
    return "../../outside/secret.txt"


def _raw(text: Callable[[bytes], bytes]) -> Change:
    def apply(root: Path, canary: Path) -> None:
        newest(root).write_bytes(text(newest(root).read_bytes()))

    return apply


def _many_runs(content: dict[str, Any], canary: Path) -> None:
    content["groups"][0]["row_groups"] = [[1, 2**24]] * 60


def _huge_numbers(content: dict[str, Any], canary: Path) -> None:
    content["groups"][0]["row_groups"] = [[10**18, 2**24]]


def _no_rows(named: Callable[[Path], str], *, old: bool) -> Change:
    """A file of the canary's as one of the dataset that no reader needs to open: it has no rows.

    Args:
        named: its path.
        old: name it in the first version, which `compact --remove_old` removes; else in the newest.
    """

    def apply(root: Path, canary: Path) -> None:
        victim = canary / Path(named(canary)).name
        path = min(root.glob("manifest-*.json")) if old else newest(root)
        content = json.loads(path.read_bytes())["manifest"]
        digest, size = oracles.sha256(victim), victim.stat().st_size
        entry = {**content["groups"][0], "path": named(canary), "sha256": digest, "bytes": size}
        entry.update(row_groups=[], n_responses=0, n_tokens=0, footer_sha256=None)
        content["groups"].append(entry)
        path.write_text(oracles.sealed("manifest", content))

    return apply


def _record(named: Callable[[Path], str]) -> Change:
    """A file of the canary's in a commit record, which goes together with its files."""

    def apply(root: Path, canary: Path) -> None:
        for path in root.glob("commits/*/*.json"):
            content = json.loads(path.read_bytes())["record"]
            for entry in oracles.named_files(content):
                entry["path"] = named(canary)  # type: ignore[index]
            path.write_text(oracles.sealed("record", content))

    return apply


def _old_manifest(root: Path, canary: Path) -> None:
    """A version that names a file outside, which `compact --remove_old` takes for its own."""
    _extra(_above)(root, canary)
    first = min(root.glob("manifest-*.json"))
    content = json.loads(newest(root).read_bytes())["manifest"]
    content["version"] = int(first.stem.split("-")[1])
    first.write_text(oracles.sealed("manifest", content))


CHANGES: dict[str, Change] = {
    "extra_absolute": _extra(_absolute),
    "extra_above": _extra(_above),
    "extra_twisted": _extra(lambda canary: "groups/../../../outside/victim.parquet"),
    "extra_text": _extra(_text),
    "extra_old": _old_manifest,
    "groups_absolute": _moved(_absolute, "groups"),
    "groups_above": _moved(_above, "groups"),
    "rewards_above": _moved(_above, "rewards"),
    "references_above": _moved(_above, "references"),
    "path_empty": _set("groups.0.path", ""),
    "path_dot": _set("groups.0.path", "."),
    "path_nul": _set("groups.0.path", "groups/a\0b.parquet"),
    "path_long": _set("groups.0.path", "a" * 5000),
    "path_control": _set("groups.0.path", f"groups/{_ESCAPE}.parquet"),
    "path_manifest": _set("groups.0.path", "manifest-000001.json"),
    "runs": resealed(_many_runs),
    "huge_numbers": resealed(_huge_numbers),
    "bytes_negative": _set("groups.0.bytes", -1),
    "bytes_huge": _set("groups.0.bytes", 10**300),
    "rows_negative": _set("groups.0.row_groups", [-5]),
    "responses_negative": _set("groups.0.n_responses", -1),
    "reward_control": _set("rewards.0.name", _ESCAPE),
    "reward_path": _set("rewards.0.name", "../../outside/owned"),
    "reward_surrogate": _set("rewards.0.name", _SURROGATE),
    "sampler_control": _rename("samplers", _ESCAPE),
    "sampler_surrogate": _rename("samplers", _SURROGATE),
    "stage_control": _set("lineage.0.stage", _ESCAPE),
    "package_control": _set("lineage.0.package_version", _ESCAPE),
    "tokenizer_control": _set("tokenizer.name_or_path", _ESCAPE),
    "tokenizer_path": _set("tokenizer.name_or_path", "../outside"),
    "model_control": _set("references.0.model_name_or_path", _ESCAPE),
    "fingerprint_path": _set("references.0.fingerprint", "../../outside"),
    "version_other": _set("version", 7),
    "version_huge": _set("version", 10**30),
    "nested": _raw(lambda text: b'{"manifest": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "digits": _raw(lambda text: b'{"manifest": {"version": ' + b"9" * 10_000_000 + b"}}"),
    "large": _raw(lambda text: b'{"manifest": "' + b"a" * (200 * 2**20) + b'"}'),
    "not_utf8": _raw(lambda text: b"\xff\xfe" + text),
    "twice": _raw(lambda text: text.replace(b'"manifest"', b'"manifest": 1, "manifest"', 1)),
}
# What is tried on `pull` in the short campaign.
PULLED = {
    "extra_absolute",
    "extra_above",
    "extra_twisted",
    "groups_above",
    "rewards_above",
    "runs",
    "path_nul",
    "path_manifest",
    "reward_control",
    "nested",
}


def _link_groups(root: Path, canary: Path) -> None:
    """A groups file is a link to a file outside that has its bytes."""
    path = _file_of_canary(root, canary)
    path.unlink()
    path.symlink_to(canary / "victim.parquet")


def _linked_folder(root: Path, canary: Path) -> None:
    """A groups file lies in a folder that is a link to the canary's."""
    path = _file_of_canary(root, canary)
    (root / "groups" / "linked").symlink_to(canary, target_is_directory=True)
    manifest = newest(root)
    content = json.loads(manifest.read_bytes())["manifest"]
    (entry,) = [e for e in content["groups"] if e["path"] == str(path.relative_to(root))]
    entry["path"] = "groups/linked/victim.parquet"
    manifest.write_text(oracles.sealed("manifest", content))
    path.unlink()


def _file_of_canary(root: Path, canary: Path) -> Path:
    """The groups file that the canary has a copy of."""
    victim = (canary / "victim.parquet").read_bytes()
    return next(path for path in (root / "groups").glob("*.parquet") if path.read_bytes() == victim)


def _link_folder(root: Path, canary: Path) -> None:
    shutil.rmtree(root / "commits", ignore_errors=True)
    (root / "commits").symlink_to(canary, target_is_directory=True)


def _link_rewards(root: Path, canary: Path) -> None:
    (root / "rewards" / "again").symlink_to(canary, target_is_directory=True)


def _in_place_of(name: Callable[[Path], Path], make: Callable[[Path], None]) -> Change:
    def apply(root: Path, canary: Path) -> None:
        path = name(root)
        path.unlink()
        make(path)

    return apply


def _first_groups(root: Path) -> Path:
    return next((root / "groups").glob("*.parquet"))


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _next_manifest(root: Path) -> Path:
    path = root / f"manifest-{int(newest(root).stem.split('-')[1]) + 1:06d}.json"
    path.touch()
    return path


def _temporary(root: Path, canary: Path) -> None:
    """Leftover names that are links to what is outside."""
    (root / ".manifest-000009.json.1.tmp").symlink_to(canary / "secret.txt")
    (root / "groups" / ".00000.1-1.tmp").symlink_to(canary / "secret.txt")
    (root / ".spill").symlink_to(canary, target_is_directory=True)


PLACES: dict[str, Change] = {
    "manifest_fifo": _in_place_of(newest, os.mkfifo),
    "manifest_folder": _in_place_of(newest, os.mkdir),
    "manifest_loop": _in_place_of(newest, _loop),
    "manifest_device": _in_place_of(newest, lambda path: path.symlink_to("/dev/zero")),
    "next_manifest_fifo": _in_place_of(_next_manifest, os.mkfifo),
    "groups_fifo": _in_place_of(_first_groups, os.mkfifo),
    "groups_folder": _in_place_of(_first_groups, os.mkdir),
    "groups_loop": _in_place_of(_first_groups, _loop),
    "commits_link": _link_folder,
    "rewards_link": _link_rewards,
    "temporary_links": _temporary,
}
# Links that lead outside: such files are read (caches and data versioning keep files so), but never
# written or removed.
LINKED: dict[str, Change] = {"groups_link": _link_groups, "folder_link": _linked_folder}
READ_BY_LINK = ("victim.parquet opened", "victim.parquet read")


def _text_absolute(canary: Path) -> str:
    return str(canary / "secret.txt")


def _text_twisted(canary: Path) -> str:
    return "groups/../../../outside/secret.txt"


# What `compact --remove_old` would remove.
REMOVED: dict[str, Change] = {
    **{
        f"{name}_{when}": _no_rows(named, old=when == "old")
        for name, named in (
            ("above", _text),
            ("absolute", _text_absolute),
            ("twisted", _text_twisted),
        )
        for when in ("old", "newest")
    },
    "record_above": _record(_text),
    "record_absolute": _record(_text_absolute),
}
