"""Corruptions: one file of a dataset, a run or a search is altered, and a command reads it.

A corruption is *found* if the command ends with an error of the project, *harmless* if it ends well
and its result is byte for byte the one without the corruption, else *silent*. `unnamed` counts
errors that do not name the altered file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from faults import oracles
from faults.cases import Outcome, run_case
from faults.journal import Line
from faults.workshop import NO_LIMIT, Workshop

_ZEROED = 64
# What a search wrote before its last file, which a rerun reads.
_DIGEST = "digest.txt"


@dataclass(frozen=True)
class Target:
    """A kind of file, and who reads it.

    Attributes:
        name: of the kind.
        start: the folder that is copied, below the workshop's folder.
        pattern: of the files, in that folder.
        consumer: what reads them: "read" (all groups, rewards and references), "remote" (the same
            through the cache of a URL), or the name of a command that goes on from the folder.
        result: patterns of the files that the command must give as without the corruption.
    """

    name: str
    start: str
    pattern: str
    consumer: str
    result: tuple[str, ...] = ()


_CHECKPOINT = "half/train"
_WEIGHTS = ("run/checkpoint-6/*.safetensors", "run/*.safetensors")
_DATA = ("data/**/*.parquet", "data/manifest-*.json")
TARGETS = (
    Target("manifest", "after/reference", "data/manifest-*.json", "read"),
    Target("groups", "after/reference", "data/groups/*.parquet", "read"),
    Target("rewards", "after/reference", "data/rewards/*/*.parquet", "read"),
    Target("reference", "after/reference", "data/reference/*/*.parquet", "read"),
    Target("record_import", "half/import", "logged/commits/*/*.json", "import", ("logged/**/*",)),
    Target("record_reward", "half/reward", "data/commits/reward*/*.json", "reward", _DATA),
    Target("record_reference", "half/reference", "data/commits/ref*/*.json", "reference", _DATA),
    Target("record_sample", "half/sample", "data/commits/sample*/*.json", "sample", _DATA),
    Target("shard_of_task", "half/import", "logged/groups/*.parquet", "import", ("logged/**/*",)),
    Target("samples", "half/sample", "data/samples/*/*.parquet", "sample", _DATA),
    Target("record_prompts", "half/sample", "data/commits/prompts*/*.json", "sample", _DATA),
    Target("prompts", "half/sample", "data/prompts/*.parquet", "sample", _DATA),
    Target("weights", _CHECKPOINT, "run/checkpoint-4/*.safetensors", "train", _WEIGHTS),
    Target("optimizer", _CHECKPOINT, "run/checkpoint-4/*.pt", "train", _WEIGHTS),
    Target("generator", _CHECKPOINT, "run/checkpoint-4/*.pth", "train", _WEIGHTS),
    Target("state", _CHECKPOINT, "run/checkpoint-4/trainer_state.json", "train", _WEIGHTS),
    Target("seal", _CHECKPOINT, "run/checkpoint-4/gvpo_checkpoint.json", "train", _WEIGHTS),
    Target("model_files", _CHECKPOINT, "run/checkpoint-4/[ct]*.json", "train", _WEIGHTS),
    Target("run_file", _CHECKPOINT, "run/gvpo_run.json", "train", _WEIGHTS),
    Target("metrics", _CHECKPOINT, "run/metrics.jsonl", "train", _WEIGHTS),
    Target("events", _CHECKPOINT, "run/events.jsonl", "train", _WEIGHTS),
    Target("trial", "half/tune", "tuned/tune/**/*.json", "tune", ("tuned/tune/proposed.yaml",)),
    Target("cache", "cached", "cache/**/*", "remote"),
    Target("input_dataset", "before/train", "data/**/*.parquet", "train", _WEIGHTS),
)
# Targets whose consumer takes seconds come up half as often.
_SLOW = {"train", "tune"}


def prepare(shop: Workshop) -> None:
    """Make the states that a stopped command leaves, and the digests of undisturbed reads."""
    half = shop.folder / "half"
    for name, output in (("import", "logged"), ("sample", "data")):
        shutil.copytree(shop.after(name), half / name)
        _stop_half(half / name / output, half / name / output)
    for name in ("reward", "reference"):
        shutil.copytree(shop.after(name), half / name)
        newest = max((half / name / "data").glob("manifest-*.json"))
        newest.unlink()
        records = sorted((half / name / "data").glob(f"commits/{name}*/*.json"))
        for record in records[max(len(records) // 2, 1) :]:
            record.unlink()
    shutil.copytree(shop.after("train"), half / "train")
    run = half / "train" / "run"
    shutil.rmtree(run / "checkpoint-6")
    for path in list(run.iterdir()):
        if path.is_file() and path.suffix != ".jsonl" and path.name != "gvpo_run.json":
            path.unlink()
    shutil.copytree(shop.after("tune"), half / "tune")
    for path in (half / "tune/tuned/tune").glob("*.*"):
        path.unlink()
    whole = shop.after("reference")
    cached = shop.folder / "cached"
    shutil.copytree(whole, cached)
    shutil.copytree(whole / "data", shop.folder.parent / "served" / "data", dirs_exist_ok=True)
    for consumer, folder in (("read", whole), ("remote", cached)):
        found = _consume(shop, consumer, folder)
        if found.status:
            raise RuntimeError(f"{consumer} failed without a corruption:\n{found.output}")
        (folder / _DIGEST).rename(shop.folder / f"{consumer}.txt")
    for target in TARGETS:
        if target.consumer not in ("read", "remote"):
            _check_half(shop, target)


def _stop_half(root: Path, folder: Path) -> None:
    """Remove the manifests and the records of the second half of the tasks."""
    for manifest in root.glob("manifest-*.json"):
        manifest.unlink()
    for stage in folder.glob("commits/*"):
        records = sorted(stage.glob("*.json"))
        if len(records) > 1:
            for record in records[len(records) // 2 :]:
                record.unlink()


def _check_half(shop: Workshop, target: Target) -> None:
    """Without a corruption, the command goes on from the state to the undisturbed result."""
    marker = shop.folder / f"checked-{target.start.replace('/', '-')}-{target.consumer}"
    if marker.exists():
        return
    folder = shop.copy(shop.folder / target.start, "check")
    found = _consume(shop, target.consumer, folder)
    if found.status or (other := _other(shop, target, folder, "")):
        raise RuntimeError(f"{target.name}: {found.output if found.status else other}")
    shutil.rmtree(folder)
    marker.touch()


def cases(shop: Workshop, number: int, seed: int = 0) -> list[tuple[str, Callable[[], Line]]]:
    """`number` corruptions, in turn over the targets."""
    quick = [target for target in TARGETS if target.consumer not in _SLOW]
    slow = [target for target in TARGETS if target.consumer in _SLOW]
    turns: list[Target] = [*quick, *slow, *quick]
    return [
        (
            f"corruption-{seed}-{i}",
            partial(one, shop, f"corruption-{seed}-{i}", turns[i % len(turns)]),
        )
        for i in range(number)
    ]


def one(shop: Workshop, case: str, target: Target) -> Line:
    """Alter a file and let its consumer read it."""
    rng = random.Random(case)
    folder = shop.copy(shop.folder / target.start, case)
    try:
        files = [path for path in sorted(folder.glob(target.pattern)) if path.is_file()]
        if not files:
            raise RuntimeError(f"no file for {target}")
        path = rng.choice(files)
        how = corrupt(path, files, rng)
        name = str(path.relative_to(folder))
        found = _consume(shop, target.consumer, folder)
        verdict, what = judge(found, lambda: _other(shop, target, folder, name))
        named = path.name in found.output or path.parent.name in found.output
        return {
            "target": target.name,
            "file": name,
            "how": how,
            "verdict": verdict,
            "what": what,
            "status": found.status,
            "output": "" if verdict == "harmless" else found.output[-500:],
            "named": named or verdict != "found",
            "traceback": found.traceback,
            "hung": found.hung,
            "peak_mb": found.peak_mb,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def judge(found: Outcome, other: Callable[[], Any]) -> tuple[str, Any]:
    """found, harmless or silent, and what differs if it is silent."""
    if found.status:
        return "found", None
    differing = other()
    return ("silent", differing) if differing else ("harmless", None)


def _consume(shop: Workshop, consumer: str, folder: Path) -> Outcome:
    if consumer == "read":
        return run_case(partial(read_all, "data", {}), folder, limits=NO_LIMIT)
    if consumer == "remote":
        settings = {"cache_dir": "cache"}
        return run_case(
            partial(read_all, f"{shop.servers.files}/data", settings), folder, limits=NO_LIMIT
        )
    return shop.run(consumer, folder)


def _other(shop: Workshop, target: Target, folder: Path, altered: str) -> Any:
    """How a command's result differs from the one without the corruption; {} or "" if it does not.

    The altered file itself is compared only if the command writes it anew.
    """
    if target.consumer in ("read", "remote"):
        same = (folder / _DIGEST).read_bytes() == (
            shop.folder / f"{target.consumer}.txt"
        ).read_bytes()
        return "" if same else "other groups were read"
    expected, found = shop.trees[target.consumer], oracles.tree(folder)
    kept = {
        str(path.relative_to(folder)) for pattern in target.result for path in folder.glob(pattern)
    } | {name for name in expected for pattern in target.result if Path(name).match(pattern)}
    kept -= {altered}
    own = {name: value for name, value in found.items() if name in kept}
    whole = {name: value for name, value in expected.items() if name in kept}
    steady = shop.steady[target.consumer]
    differing = oracles.differences(own, whole, steady)
    differing.pop("orphans", None)  # the shards of a task that was done again
    return differing


def read_all(path: str, remote: dict[str, Any], version: int | None = None) -> int:
    """Read all groups with reward and reference, and write a digest of all values."""
    from gvpo_offline import RemoteSettings, open_dataset
    from gvpo_offline.errors import GVPOError

    digest = hashlib.sha256()
    try:
        dataset = open_dataset(
            path, reward="brief", remote=RemoteSettings(**remote), version=version
        )
        for number in range(dataset.n_row_groups):
            for group in dataset.groups(number):
                digest.update(repr(_plain(group)).encode())
        digest.update(dataset.manifest.model_dump_json().encode())
    except GVPOError as error:
        print(f"error: {error}")
        return 1
    Path(_DIGEST).write_text(digest.hexdigest())
    return 0


def _plain(group: Any) -> list[Any]:
    return [(field.name, _lists(getattr(group, field.name))) for field in dataclasses.fields(group)]


def _lists(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [item.tolist() if hasattr(item, "tolist") else item for item in value]
    return value


def corrupt(path: Path, same_kind: Sequence[Path], rng: random.Random) -> str:
    """Alter a file in place; returns how. Its bytes differ afterwards."""
    before = path.read_bytes()
    others = [other for other in same_kind if other != path and other.read_bytes() != before]
    ways: list[str] = ["flip", "flip", "flip", "zero", "cut", "extend", "empty", "delete", "digit"]
    ways += ["swap"] if others else []
    for _ in range(100):
        how = rng.choice(ways)
        if how == "delete":
            path.unlink()
            return how
        after, where = _altered(how, before, others, rng)
        if after != before:
            path.write_bytes(after)
            return f"{how} {where}"
    path.write_bytes(before + b"x")
    return "extend"


def _altered(
    how: str, before: bytes, others: Sequence[Path], rng: random.Random
) -> tuple[bytes, str]:
    size = len(before)
    at = rng.randrange(size) if size else 0
    if how == "flip" and size:
        bit = rng.randrange(8)
        return before[:at] + bytes([before[at] ^ 1 << bit]) + before[at + 1 :], f"bit {bit} of {at}"
    if how == "zero" and size:
        span = before[at : at + _ZEROED]
        return before[:at] + bytes(len(span)) + before[at + len(span) :], f"at {at}"
    if how == "cut":
        return before[:at], f"at {at} of {size}"
    if how == "extend":
        return before + rng.randbytes(rng.randint(1, 200)), ""
    if how == "swap":
        other = rng.choice(list(others))
        return other.read_bytes(), f"with {other.name}"
    if how == "digit":
        places = [i for i, byte in enumerate(before) if 48 <= byte <= 57]
        if places:
            at = rng.choice(places)
            return before[:at] + str(rng.randrange(10)).encode() + before[at + 1 :], f"at {at}"
    return b"", ""
