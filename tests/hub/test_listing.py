"""`ls`: what the manifests say, what the summary columns add, for people and for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import build_dataset, make_group, make_groups
from support.merging import add_sidecars
from support.rewarding import answered_dataset, functions, reward

from gvpo_offline.cli import main
from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.hashing import sha256_text
from gvpo_offline.info.dataset import QUANTILES, dataset_info
from gvpo_offline.info.text import info_lines, overview_lines, size_text
from gvpo_offline.merging.settings import CompactConfig
from gvpo_offline.merging.stages import compact
from gvpo_offline.store.manifest import Manifest, TokenizerInfo, load_manifest
from gvpo_offline.store.writer import publish
from gvpo_offline.version import __version__


def section(lines: list[str], title: str) -> list[str]:
    """The lines under a title, without it."""
    start = next(n for n, line in enumerate(lines) if line.startswith(f"  {title} "))
    stop = next((n for n in range(start, len(lines)) if not lines[n]), len(lines))
    return [line[15:] for line in lines[start:stop]]


def tokenizer(name: str) -> TokenizerInfo:
    return TokenizerInfo(name_or_path=name, fingerprint=sha256_text(name), vocab_size=1234)


# ---- from manifests ----


def test_counts_and_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    """24 groups in 3 shards, with one reward and one reference: 9 files."""
    dataset = build_dataset(tmp_path, 24, tokenizer=tokenizer("org/model"))
    groups = make_groups(24)
    info = dataset_info(tmp_path).as_dict()
    assert (info["version"], info["groups"]) == (1, 24)
    assert info["responses"] == sum(group.group_size for group in groups)
    assert info["tokens"] == sum(group.n_tokens for group in groups)
    assert info["total"]["files"] == 9
    assert info["total"]["bytes"] == sum(
        path.stat().st_size for path in tmp_path.rglob("*.parquet")
    )
    parts = [info["base"], info["rewards"][0]["size"], info["references"][0]["size"]]
    assert sum(part["bytes"] for part in parts) == info["total"]["bytes"]
    sizes = [path.stat().st_size for path in (tmp_path / "groups").iterdir()]
    assert info["base"] == {"files": 3, "bytes": sum(sizes)}
    assert info["references"][0]["fingerprint"] == dataset.manifest.references[0].fingerprint
    assert info["tokenizer"] == tokenizer("org/model").model_dump()


def test_nothing_but_manifests_and_rewards_is_read(tmp_path: Path) -> None:
    """The listing is the same once every other Parquet file is gone. The mean is over responses:
    groups have 2 to 5. Without the files of the rewards only the mean is missing.
    """
    build_dataset(tmp_path, 24)
    rewards = np.concatenate([group.rewards for group in make_groups(24)])
    before = info_lines(dataset_info(tmp_path))
    for path in tmp_path.rglob("*.parquet"):
        if path.parent.parent.name != "rewards":
            path.unlink()
    assert info_lines(dataset_info(tmp_path)) == before
    mean = dataset_info(tmp_path).as_dict()["rewards"][0]["mean"]
    # Sums of 24 groups of numbers with few digits, in another order.
    assert mean == pytest.approx(rewards.mean(), rel=1e-12)
    (row,) = section(before, "rewards")
    assert f"mean {rewards.mean():.4g}" in row
    assert f"reward@1 mean {mean:.4g}" in overview_lines([dataset_info(tmp_path)])[1]
    for path in tmp_path.rglob("*.parquet"):
        path.unlink()
    assert dataset_info(tmp_path).as_dict()["rewards"][0]["mean"] is None
    assert "reward@1" in overview_lines([dataset_info(tmp_path)])[1]


def test_versions_say_what_each_brought(tmp_path: Path) -> None:
    """Import; then a reward and a reference at once; then all files anew."""
    build_dataset(tmp_path, 24, reference=False)
    add_sidecars(tmp_path)
    manifest = load_manifest(tmp_path)
    compact(CompactConfig(str(tmp_path), show_progress=False))
    publish(tmp_path, lambda new: new and new.model_copy(update={"references": []}))
    found = dataset_info(tmp_path).as_dict()["versions"]
    reference = f"reference {manifest.references[0].fingerprint[:12]}"
    everything = ["groups", "reward reward@1", "reward length@2", reference]
    added = [version["added"] for version in found]
    assert added == [everything[:2], everything[2:], everything, []]
    assert [version["removed"] for version in found] == [[], [], [], [reference]]
    assert [version["new"]["files"] for version in found] == [6, 6, 4, 0]
    assert [version["version"] for version in dataset_info(tmp_path, 2).as_dict()["versions"]] == [
        1,
        2,
    ]
    rows = section(info_lines(dataset_info(tmp_path)), "versions")
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4"]
    assert rows[3].split("24 groups")[1].split() == ["nothing", "new", *f"- {reference}".split()]


def test_a_reward_says_what_made_it(tmp_path: Path) -> None:
    root = answered_dataset(tmp_path / "data", 8)
    path = functions(tmp_path)
    scorers = {
        "right": {"kind": "exact", "column": "answer"},
        "length": {"kind": "function", "function": f"{path}:length", "weight": -0.2},
    }
    reward(root, scorers, name="both")
    lines = info_lines(dataset_info(root))
    (row,) = section(lines, "rewards")
    assert row.startswith("both@1  ")
    assert "-0.2 * length (function), right (exact)" in row
    assert row.endswith("keeps length, right")
    assert section(lines, "lineage")[-1].split()[:4] == ["2", "reward", __version__, "both"]


@pytest.mark.parametrize(
    ("own", "theirs", "said"),
    [
        ("a", "a", "the dataset's"),
        ("a", "b", "another"),
        ("a", None, "not said"),
        (None, "a", "not said"),
    ],
)
def test_whether_a_reference_reads_the_datasets_tokens(
    tmp_path: Path, own: str | None, theirs: str | None, said: str
) -> None:
    build_dataset(tmp_path, 4, tokenizer=tokenizer(own) if own else None)
    fingerprint = sha256_text(theirs) if theirs else None

    def rename(newest: Any) -> Any:
        family = newest.references[0].model_copy(update={"tokenizer_fingerprint": fingerprint})
        return newest.model_copy(update={"references": [family]})

    publish(tmp_path, rename)
    assert dataset_info(tmp_path).as_dict()["references"][0]["tokenizer"] == said
    assert section(info_lines(dataset_info(tmp_path)), "references")[0].endswith(said)


def test_a_dataset_with_nothing_but_groups(tmp_path: Path) -> None:
    build_dataset(tmp_path, 4, reward=None, reference=False)
    lines = info_lines(dataset_info(tmp_path))
    assert section(lines, "rewards") == section(lines, "references") == ["none"]
    assert section(lines, "tokenizer") == ["not said"]


def test_several_datasets_are_a_table(tmp_path: Path) -> None:
    build_dataset(tmp_path / "a", 24)
    build_dataset(tmp_path / "much-longer", 4, reward=None, reference=False)
    heading, *rows = overview_lines([dataset_info(tmp_path / n) for n in ("a", "much-longer")])
    assert [row.split()[:3] for row in rows] == [
        [str(tmp_path / "a"), "1", "24"],
        [str(tmp_path / "much-longer"), "1", "4"],
    ]
    assert rows[1].split()[-4:] == ["none", "none", "not", "checked"]
    ends = [line.index(word) + len(word) for line, word in ((heading, "groups"), (rows[0], " 24"))]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234, "1.23 kB"), (999_499, "999 kB")),
        *((999_500, "1 MB"), (12_345_678, "12.3 MB"), (5 * 10**9, "5 GB"), (10**18, "1e+03 PB")),
    ],
)
def test_sizes_in_words(n_bytes: int, text: str) -> None:
    assert size_text(n_bytes) == text


@given(st.integers(0, 10**17))
def test_a_size_in_words_is_within_half_a_percent(n_bytes: int) -> None:
    """Three digits: at worst 1.005 is said as 1.00 (or 1.01)."""
    number, unit = size_text(n_bytes).split()
    power = ["B", "kB", "MB", "GB", "TB", "PB"].index(unit)
    assert float(number) * 1000**power == pytest.approx(n_bytes, rel=0.00501)


# ---- from summary columns ----


def test_content_is_what_the_groups_say(tmp_path: Path) -> None:
    build_dataset(tmp_path, 24)
    add_sidecars(tmp_path)
    groups = make_groups(24)
    found = dataset_info(tmp_path, content=True).as_dict()["content"]
    assert found["group_sizes"] == dict(sorted(Counter(g.group_size for g in groups).items()))
    for name, own in found["samplers"].items():
        mine = [(g, i) for g in groups for i, s in enumerate(g.samplers) if s == name]
        assert own["responses"] == len(mine)
        assert own["truncated"] == sum(g.truncated[i] for g, i in mine)
        mean_tokens = np.mean([g.response_lengths[i] for g, i in mine])
        assert own["mean_tokens"] == pytest.approx(mean_tokens)
        mean = np.mean([rewards(g)[i] for g, i in mine])
        assert own["mean_rewards"]["reward@1"] == pytest.approx(mean)
    values = np.concatenate([rewards(g) for g in groups])
    own = found["rewards"]["reward@1"]
    assert (own["min"], own["max"]) == (values.min(), values.max())
    assert own["mean"] == pytest.approx(values.mean())
    assert own["equal_groups"] == sum(np.ptp(rewards(g)) == 0 for g in groups)
    assert list(found["rewards"]) == ["reward@1", "length@2"]


def rewards(group: Group) -> np.ndarray[Any, Any]:
    assert group.rewards is not None
    return np.asarray(group.rewards)


def test_content_says_how_many_groups_share_a_prompt(tmp_path: Path) -> None:
    """Prompt 1 in three groups, prompt 2 in one, prompt 3 in two: 5 of 6 groups share theirs."""
    groups = [
        make_group(number, prompt_token_ids=np.array([prompt, 9], np.int32))
        for number, prompt in enumerate([1, 2, 3, 1, 3, 1])
    ]
    build_dataset(tmp_path, groups=groups)
    info = dataset_info(tmp_path, content=True)
    assert info.as_dict()["content"]["prompts"] == {
        "prompts": 3,
        "groups_with_shared_prompt": 5,
        "exact": True,
    }
    (line,) = section(info_lines(info), "prompts")
    assert line == "3; 5 of 6 groups share their prompt with another group"
    assert "prompts" not in "\n".join(info_lines(dataset_info(tmp_path)))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=60))
def test_quantiles_of_lengths(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    """As NumPy's inverted_cdf has them: the smallest value that a share q does not exceed."""
    root = tmp_path_factory.mktemp("lengths")
    groups = [make_group(n, k=2, response_tokens=length) for n, length in enumerate(lengths)]
    build_dataset(root, groups=groups, groups_per_shard=16, reward=None, reference=False)
    found = dataset_info(root, content=True).as_dict()["content"]
    expected = np.quantile(np.repeat(lengths, 2), QUANTILES, method="inverted_cdf")
    assert found["lengths"]["response"] == expected.tolist()


def test_content_of_nothing(tmp_path: Path) -> None:
    publish(tmp_path, lambda newest: Manifest(groups=[]))
    info = dataset_info(tmp_path, content=True)
    found = info.as_dict()["content"]
    assert (found["samplers"], found["group_sizes"], found["rewards"]) == ({}, {}, {})
    assert found["lengths"] == {"prompt": [], "response": []}
    assert info_lines(info)


# ---- the command ----

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        status = main(["ls", *argv])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_the_command(tmp_path: Path, run: Run) -> None:
    """By word or by flag, alike."""
    root = str(build_dataset(tmp_path / "data", 8).root)
    by_word, by_flag = run(root), run("--dataset", root)
    assert by_word == by_flag
    assert by_word[0] == 0
    assert by_word[1].splitlines() == info_lines(dataset_info(Path(root), checks=True))
    counted = run(root, "--content")[1]
    assert counted.startswith(by_word[1].rstrip("\n"))
    assert section(counted.splitlines(), "mean reward")


def test_for_programs(tmp_path: Path, run: Run) -> None:
    """One object a line; the numbers are the manifest's, the content that of `content`."""
    one = build_dataset(tmp_path / "one", 8, tokenizer=tokenizer("t")).root
    two = build_dataset(tmp_path / "two", 4).root
    status, out, _ = run(str(one), str(two), "--json")
    first, second = map(json.loads, out.splitlines())
    assert (status, first["groups"], second["groups"]) == (0, 8, 4)
    manifest = load_manifest(one)
    assert first["tokenizer"] == json.loads(manifest.tokenizer.model_dump_json())  # type: ignore[union-attr]
    assert first["lineage"] == [json.loads(step.model_dump_json()) for step in manifest.lineage]
    assert first["total"]["bytes"] == sum(entry.bytes for entry in manifest.files())
    assert "content" not in first
    assert [own["checks"]["verdict"] for own in (first, second)] == ["warn", "warn"], "few groups"
    (counted,) = map(json.loads, run(str(two), "--json", "--content")[1].splitlines())
    assert sum(counted["content"]["group_sizes"].values()) == 4


def test_the_verdict_of_the_light_checks(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a dataset with a file that is gone; not of one that would keep a list waiting."""
    root = build_dataset(tmp_path / "data", 8).root
    n_responses = sum(file.n_responses for file in load_manifest(root).groups)
    monkeypatch.setattr("gvpo_offline.info.dataset.MOST_CHECKED_RESPONSES", n_responses)
    status, out, _ = run(str(root))
    lines = section(out.splitlines(), "verdict")
    assert (status, lines[0].split(":")[0]) == (0, "warn")
    assert [line.split()[:2] for line in lines if "few-groups" in line] == [
        ["warning", "few-groups"]
    ]
    assert [line.split()[-1] for line in run(str(root), str(root))[1].splitlines()] == [
        *("verdict", "warn", "warn")
    ]
    monkeypatch.setattr("gvpo_offline.info.dataset.MOST_CHECKED_RESPONSES", n_responses - 1)
    assert section(run(str(root))[1].splitlines(), "verdict")[0].startswith("not checked")
    monkeypatch.undo()
    next(root.glob("groups/*.parquet")).unlink()
    lines = section(run(str(root))[1].splitlines(), "verdict")
    assert lines[0] == "fail: 1 error"


def test_several_are_a_line_each(tmp_path: Path, run: Run) -> None:
    roots = [str(build_dataset(tmp_path / name, 4).root) for name in "abc"]
    assert len(run(*roots)[1].splitlines()) == 4


def test_an_older_version(tmp_path: Path, run: Run) -> None:
    build_dataset(tmp_path, 8, reference=False)
    add_sidecars(tmp_path)
    out = run(str(tmp_path), "--dataset_version", "1")[1].splitlines()
    assert out[0].startswith(f"{tmp_path}: version 1, ")
    assert section(out, "references") == ["none"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "dataset must be set"),
        (["nowhere"], "a folder that holds a manifest"),
        (["a", "b", "--dataset_version", "1"], "dataset_version needs a single dataset"),
        (["a", "--json", "perhaps"], "json"),
    ],
)
def test_what_cannot_be_listed(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*argv)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert message in err


def test_a_version_that_does_not_exist(tmp_path: Path) -> None:
    build_dataset(tmp_path, 4)
    with pytest.raises(DataError, match="of version 9"):
        dataset_info(tmp_path, 9)
