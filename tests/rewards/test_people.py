"""People as scorers: what files say, joined, and made into numbers."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.rewarding import answered_dataset, read, reward

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import FloatArray
from gvpo_offline.hashing import sha256_json
from gvpo_offline.rewards.people.bradley_terry import connected, log_strengths
from gvpo_offline.rewards.people.scorers import share_beaten
from gvpo_offline.store.dataset import open_dataset

Rows = list[dict[str, Any]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Groups group-00000 and on; response i of group 7 is called 7.i."""
    return answered_dataset(tmp_path / "data")


def write(path: Path, rows: Rows) -> Path:
    """Rows in the format that the suffix names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def people(kind: str, path: Path, **settings: Any) -> dict[str, Any]:
    return {"p": {"kind": kind, "inputs": str(path), **settings}}


def group(number: int) -> str:
    return f"group-{number:05d}"


def sizes(root: Path) -> dict[str, int]:
    dataset = open_dataset(root, join=())
    groups = [g for i in range(dataset.n_row_groups) for g in dataset.groups(i)]
    return {g.group_id: g.group_size for g in groups}


def component(root: Path, number: int) -> list[float]:
    """The scorer's numbers for one group; NaN where it has none."""
    found = next(g for g in read(root) if g.group_id == group(number))
    assert found.components is not None
    values: list[float] = found.components[0].tolist()
    return values


def rating(number: int, response: Any, value: Any, rater: str = "ann") -> dict[str, Any]:
    return {"group_id": group(number), "response_id": response, "rating": value, "rater": rater}


# ---- ratings ----


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_ratings_are_averaged_over_people(root: Path, tmp_path: Path, suffix: str) -> None:
    """4 and 2 make 3; the response that nobody rated has no number, and neither has any of the
    other groups: `missing` says what their reward is.
    """
    rows = [rating(3, "3.0", 4.0), rating(3, "3.0", 2.0, "bob"), rating(3, "3.1", -1.5)]
    path = write(tmp_path / f"ratings{suffix}", rows)
    with pytest.raises(DataError, match="at least one scorer has a number for every response"):
        reward(root, people("ratings", path, rater_column="rater"))
    result = reward(root, people("ratings", path, rater_column="rater"), missing=0.0)
    k = sizes(root)[group(3)]
    np.testing.assert_array_equal(component(root, 3), [3.0, -1.5] + [math.nan] * (k - 2))
    assert result.counts == {"missing": sum(sizes(root).values()) - 2}
    assert "inputs" not in result.family.config["scorers"]["p"]


def test_the_files_content_is_the_version(root: Path, tmp_path: Path) -> None:
    """A file that moved is the same; one more rating is not."""
    rows = [rating(0, "0.0", 1)]
    first = write(tmp_path / "one.jsonl", rows)
    assert reward(root, people("ratings", first), missing=0.0).family.version == 1
    moved = first.rename(tmp_path / "two.jsonl")
    assert reward(root, people("ratings", moved), missing=0.0).family.version == 1
    write(moved, [*rows, rating(0, "0.1", 1)])
    assert reward(root, people("ratings", moved), missing=0.0).family.version == 2


# SHA-256 of the identities that version 0.1.0 gave: another one would make a new version of every
# reward that datasets hold, and leave half-done stages behind.
IDENTITIES = {
    "ratings": "e4cb58680e61510782710fb607f961d8e6e1e472c38b6686e2c9beee5dfb3fdd",
    "ranks": "bd9ec70fd87265777c0ad9717dcdf71de090bf201a1480fd2f0e64a79324b0e7",
    "votes": "6a3458f3533576e17682eb136e62cd9479df466fb895b4ff6d6e60b5de8780a6",
}


@pytest.mark.parametrize("kind", IDENTITIES)
def test_identities_stay_as_they_were(root: Path, tmp_path: Path, kind: str) -> None:
    rows = [{**rating(0, "0.0", 1), "rank": 1, **vote(0, 0, 1, "a")}]
    path = write(tmp_path / "said.jsonl", rows)
    more = {"estimate": "win_rate"} if kind == "votes" else {"rater_column": "rater"}
    result = reward(root, people(kind, path, **more), missing=0.0)
    assert sha256_json(result.family.config) == IDENTITIES[kind]


def test_responses_go_by_index_or_sampler(root: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "by_index.jsonl", [rating(0, 1, 5.0), rating(1, "0", 2.0)])
    reward(root, people("ratings", path, response_by="index"), missing=0.0)
    assert component(root, 0)[1] == 5.0
    assert component(root, 1)[0] == 2.0
    dataset = open_dataset(root, join=())
    groups = [g for i in range(dataset.n_row_groups) for g in dataset.groups(i, ["samplers"])]
    found = next(
        (g.group_id, s, g.samplers.index(s)) for g in groups for s in g.samplers if
        g.samplers.count(s) == 1
    )  # fmt: skip
    row = {"group_id": found[0], "response_id": found[1], "rating": 7}
    path = write(tmp_path / "by_sampler.csv", [row])
    reward(root, people("ratings", path, response_by="sampler"), missing=0.0)
    assert component(root, int(found[0][-5:]))[found[2]] == 7.0
    twice = next((g.group_id, s) for g in groups for s in g.samplers if g.samplers.count(s) > 1)
    row = {"group_id": twice[0], "response_id": twice[1], "rating": 7}
    path = write(tmp_path / "ambiguous.csv", [row])
    with pytest.raises(DataError, match=r"csv, row 0, group .*which is several of"):
        reward(root, people("ratings", path, response_by="sampler"), missing=0.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            rating(99, "99.0", 1),
            r"row 1, group 'group-00099': the group of every .* is in the dataset",
        ),
        (rating(0, "0.9", 1), r"row 1, group 'group-00000'.*'0\.9', which is none of 0\.0, 0\.1"),
        (rating(0, "0.0", 1), r"row 1.*judges a response once.*response 0 by ann"),
        (
            rating(0, "0.1", "good"),
            r"row 1, group 'group-00000': column rating .*a finite number.*'good'",
        ),
        (
            rating(0, "0.1", float("inf")),
            r"row 1, group 'group-00000': column rating holds a finite number",
        ),
        (rating(0, "0.\ud800", 1), r"row 1, group 'group-00000': column response_id holds text"),
        (rating(0, None, 1), r"row 1, group 'group-00000': column response_id holds text"),
        (
            rating(0, "0.1", True),
            r"row 1, group 'group-00000': column rating .*a finite number.*True",
        ),
        (
            {"group_id": group(0), "response": "x"},
            r"row 1, group 'group-00000': column response_id .*the columns group",
        ),
        ({"id": 3}, r"row 1: column group_id"),
    ],
)
def test_rows_that_fit_nowhere(
    root: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    """Refused with file and row, before anything is scored."""
    path = write(tmp_path / "ratings.jsonl", [rating(0, "0.0", 1), row])
    with pytest.raises(DataError, match=rf"ratings\.jsonl, {message}"):
        reward(root, people("ratings", path, rater_column="rater"), missing=0.0)
    assert not (root / "rewards").exists()


def test_files_that_cannot_be_read(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    header = "group_id,response_id,rating\ngroup-00000,0.0,1\n"
    for text, message in (
        (header + "group-00000,0.1\n", r"r\.csv, row \d: a row of a CSV file"),
        (header + 'group-00000,0.1,"1\n', r"r\.csv, row \d: a row of a CSV file"),
        ("", "begins with a header"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            reward(root, people("ratings", path), missing=0.0)
    with pytest.raises(DataError, match="names at least one file"):
        reward(root, people("ratings", tmp_path / "none.csv"))
    with pytest.raises(ConfigError, match="estimate"):
        reward(root, people("votes", path))


# ---- ranks ----


def test_ranks_are_shares_of_others_beaten(root: Path, tmp_path: Path) -> None:
    """Ann ranks three: 1, 2, 2, so 1, 1/4, 1/4. Bob ranks two, the other way round: 0 and 1 for
    the first two. Cid ranks one, which says nothing. Means: 1/2, 5/8, 1/4.
    """
    number = next(int(g[-5:]) for g, k in sizes(root).items() if k >= 4)
    said = {"ann": [1, 2, 2], "bob": [9, 3], "cid": [1]}
    rows = [
        {"group_id": group(number), "response_id": f"{number}.{i}", "rank": rank, "rater": rater}
        for rater, ranks in said.items()
        for i, rank in enumerate(ranks)
    ]
    path = write(tmp_path / "ranks.csv", rows)
    reward(root, people("ranks", path, rater_column="rater"), missing=0.0)
    found = component(root, number)
    assert found[:3] == [0.5, 0.625, 0.25]
    assert np.isnan(found[3:]).all()
    with pytest.raises(DataError, match=r"row 3.*a rater judges a response once"):
        reward(root, people("ranks", path), missing=0.0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=6))
def test_shares_beaten(ranks: list[int]) -> None:
    """Against counting in plain Python; a ranking shares out 1/2 on average."""
    shares = share_beaten(np.array(ranks, np.float64))
    for i, rank in enumerate(ranks):
        others = ranks[:i] + ranks[i + 1 :]
        points = sum(1.0 if rank < o else 0.5 if rank == o else 0.0 for o in others)
        assert shares[i] == pytest.approx(points / len(others))
    assert shares.mean() == pytest.approx(0.5)


# ---- votes ----


def vote(number: int, first: int, second: int, winner: str) -> dict[str, Any]:
    return {
        "group_id": group(number),
        "response_a": f"{number}.{first}",
        "response_b": f"{number}.{second}",
        "winner": winner,
    }


def test_votes(root: Path, tmp_path: Path) -> None:
    """Response 1 wins twice, once by name, and ties once with 0: 2.5 of 3 against 0.5 of 3; as
    strengths log((2.5 + 1/2) / (0.5 + 1/2)) = log 3, shared out around 0.
    """
    votes = [vote(2, 0, 1, "b"), vote(2, 1, 0, "2.1"), vote(2, 0, 1, "Tie")]
    path = write(tmp_path / "votes.jsonl", votes)
    result = reward(root, people("votes", path, estimate="win_rate"), missing=0.0)
    assert component(root, 2)[:2] == pytest.approx([0.5 / 3, 2.5 / 3])
    assert result.family.config["scorers"]["p"]["estimate"] == "win_rate"
    reward(root, people("votes", path, estimate="bradley_terry"), missing=0.0)
    half = math.log(3) / 2
    assert component(root, 2)[:2] == pytest.approx([-half, half])
    assert np.isnan(component(root, 2)[2:]).all()
    assert np.isnan(component(root, 3)).all()


def test_votes_that_fit_nowhere(root: Path, tmp_path: Path) -> None:
    number = next(int(g[-5:]) for g, k in sizes(root).items() if k >= 4)
    apart = [vote(number, 0, 1, "a"), vote(number, 2, 3, "a")]
    for rows, message in (
        (apart, rf"row 0, group '{group(number)}': votes connect all.*estimate: win_rate"),
        ([vote(0, 0, 0, "a")], "between two responses"),
        ([vote(0, 0, 1, "c")], "the winner of a vote is a, b, tie"),
    ):
        path = write(tmp_path / "votes.jsonl", rows)
        with pytest.raises(DataError, match=message):
            reward(root, people("votes", path, estimate="bradley_terry"), missing=0.0)
    write(path, apart)
    reward(root, people("votes", path, estimate="win_rate"), missing=0.0)
    assert component(root, number)[:4] == [1.0, 0.0, 1.0, 0.0]


# ---- Bradley-Terry ----

_COUNTS = st.integers(0, 200).map(lambda n: n / 2)


@settings(deadline=None)
@given(_COUNTS, _COUNTS, st.floats(0.001, 10))
def test_two_responses_in_closed_form(won: float, lost: float, prior: float) -> None:
    """s_0 - s_1 = log((won + prior / 2) / (lost + prior / 2)), around 0."""
    assume(won + lost > 0)
    found = log_strengths(np.array([[0, won], [lost, 0]]), prior)
    gap = math.log((won + prior / 2) / (lost + prior / 2))
    np.testing.assert_allclose(found, [gap / 2, -gap / 2], rtol=1e-7, atol=1e-9)


def likelihood(wins: FloatArray, prior: float, strengths: Sequence[float]) -> float:
    """Term by term, in plain Python."""
    total = 0.0
    for i in range(len(wins)):
        for j in range(len(wins)):
            if wins[i, j] + wins[j, i] > 0:
                weight = wins[i, j] + prior / 2
                total -= weight * math.log1p(math.exp(strengths[j] - strengths[i]))
    return total


def brute_force(wins: FloatArray, prior: float) -> list[float]:
    """The optimum by trying steps along each axis, and halving them where none helps."""
    at, step = [0.0] * len(wins), 1.0
    best = likelihood(wins, prior, at)
    while step > 1e-7:
        improved = False
        for i in range(1, len(at)):  # the first is held at 0
            for move in (step, -step):
                tried = [*at[:i], at[i] + move, *at[i + 1 :]]
                if (value := likelihood(wins, prior, tried)) > best:
                    at, best, improved = tried, value, True
        step = step if improved else step / 2
    return [s - sum(at) / len(at) for s in at]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("prior", [0.1, 1.0])
def test_the_optimum_that_brute_force_finds(seed: int, prior: float) -> None:
    """3 to 5 responses, not all of them compared, some that never lost."""
    rng = np.random.default_rng(seed)
    n = 3 + seed % 3
    wins = np.zeros((n, n))
    for i in range(n - 1):
        wins[i, i + 1] = rng.integers(1, 5)
    wins += np.triu(rng.integers(0, 3, (n, n)), 1).T
    found = log_strengths(wins, prior)
    np.testing.assert_allclose(found, brute_force(wins, prior), atol=1e-5)


@settings(deadline=None)
@given(st.integers(2, 6), st.data())
def test_laws_of_strengths(n: int, data: st.DataObject) -> None:
    """Renaming the responses renames the strengths, and turning all votes round turns the signs."""
    flat = data.draw(st.lists(st.integers(0, 50), min_size=n * n, max_size=n * n))
    wins = np.array(flat, np.float64).reshape(n, n)
    np.fill_diagonal(wins, 0)
    assume(connected(wins))
    found = log_strengths(wins, 1.0)
    order = np.array(data.draw(st.permutations(range(n))))
    np.testing.assert_allclose(
        log_strengths(wins[np.ix_(order, order)], 1.0), found[order], atol=1e-6
    )
    np.testing.assert_allclose(log_strengths(wins.T, 1.0), -found, atol=1e-6)
    assert found.mean() == pytest.approx(0, abs=1e-9)


def test_who_never_lost_has_a_finite_strength() -> None:
    """1,000 wins and no loss, with next to no prior: log(1000.0005 / 0.0005), in few steps."""
    found = log_strengths(np.array([[0.0, 1000.0], [0.0, 0.0]]), 0.001)
    assert found[0] - found[1] == pytest.approx(math.log(1000.0005 / 0.0005))


def test_connected() -> None:
    chain = np.zeros((4, 4))
    chain[[0, 1, 3], [1, 2, 2]] = 1
    assert connected(chain)
    assert not connected(np.kron(np.eye(2), np.ones((2, 2))))


def test_limits_bound_the_files_and_are_no_part_of_the_identity(root: Path, tmp_path: Path) -> None:
    """A file of people's ratings whose rows are longer than limits.row_bytes is refused."""
    rows = [{"group_id": group(0), "response_id": f"0.{i}", "rating": i} for i in range(2)]
    path = write(tmp_path / "r.jsonl", rows)
    longest = max(map(len, path.read_text().splitlines(keepends=True)))
    with pytest.raises(DataError, match=f"a row has at most {longest - 1:,} bytes.*row_bytes"):
        reward(root, people("ratings", path, limits={"row_bytes": longest - 1}))
    with pytest.raises(ConfigError, match="limits"):
        reward(root, people("ratings", path, limits={"row_byte": 1}))
    assert reward(root, people("ratings", path), missing=0.0).family.version == 1
    wider = people("ratings", path, limits={"row_bytes": longest})
    assert reward(root, wider, missing=0.0).family.version == 1  # the same rewards
