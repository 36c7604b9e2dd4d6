"""Judges: questions to a real server, answers that are kept, and what is made of them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.fork_server import ForkServer
from support.judging import JudgeServer, judge, rating, shown_numbers
from support.rewarding import answered_dataset, read, reward, scoring_input

from gvpo_offline import cli
from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.group import Group
from gvpo_offline.openai.answer import BadAnswerError
from gvpo_offline.rewards.judge.log import Journal, Judgement
from gvpo_offline.rewards.judge.pairs import pairs_of, win_rates
from gvpo_offline.rewards.judge.rubric import Rubric
from gvpo_offline.rewards.kinds import JudgePairsSettings, JudgeSettings
from gvpo_offline.rewards.settings import RewardConfig
from gvpo_offline.rewards.stage import run_reward
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.workers.settings import WorkerSettings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return answered_dataset(tmp_path / "data")


@pytest.fixture
def served() -> Iterator[JudgeServer]:
    started = JudgeServer()
    yield started
    started.close()


def numbers_of(group: Group) -> list[int]:
    """Of the responses "It is {number}"."""
    assert group.responses is not None
    return [shown_numbers(text)[0] for text in group.responses]


def answers(root: Path) -> list[dict[str, Any]]:
    """Every row of the committed files of judgements."""
    files = sorted((root / "judgements").rglob("*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def sidecars(root: Path) -> dict[str, bytes]:
    """Every reward file of a dataset."""
    found = sorted((root / "rewards").rglob("*.parquet"))
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


# ---- numbers ----


def test_a_rating_for_each_response(root: Path, served: JudgeServer) -> None:
    """The last line counts, not the numbers in the reasons; raw answers are kept with the file."""
    family = reward(root, {"helpful": judge(served, temperature=0.5, seed=3)}).family
    groups = read(root)
    for group in groups:
        assert group.rewards is not None
        assert group.rewards.tolist() == [rating(n) for n in numbers_of(group)]
    kept = answers(root)
    assert len(kept) == sum(group.group_size for group in groups) == served.asked.total()
    assert {row["model"] for row in kept} == {"tiny-1"}
    assert all(row["text"].endswith(f"\nScore: {row['value']:.0f}") for row in kept)
    settings = family.config["scorers"]["helpful"]
    assert settings["model"] == "tiny"
    assert len(settings["rubric_sha256"]) == 64
    assert "base_url" not in settings
    assert not list((root / "judgements").rglob("*.jsonl"))
    assert {(body["temperature"], body["seed"]) for body in served.bodies} == {(0.5, 3)}


def test_what_was_asked_is_not_asked_again(root: Path, served: JudgeServer) -> None:
    """Another weight, name or address asks nothing; another rubric is another judge."""
    reward(root, {"a": judge(served)})
    served.asked.clear()
    assert reward(root, {"a": judge(served, weight=2.0)}).family.version == 2
    assert reward(root, {"b": judge(served, concurrency=1)}, name="other").family.version == 1
    assert not served.asked
    assert reward(root, {"a": judge(served, system="Be strict.")}).family.version == 3
    assert served.asked
    assert served.bodies[-1]["messages"][0] == {"role": "system", "content": "Be strict."}


def test_pairs_are_shown_in_both_orders(root: Path, served: JudgeServer) -> None:
    """The judge prefers whatever is shown first between neighbours: 1 and 0 in the two orders, so
    1/2 each. Of k = 4 the numbers n, n + 1, n + 2, n + 3 win (1/2 + 0 + 0) / 3,
    (1/2 + 1/2 + 0) / 3, (1 + 1/2 + 1/2) / 3 and (1 + 1 + 1/2) / 3.
    """
    result = reward(root, {"better": judge(served, kind="judge_pairs")})
    assert result.family.components == ["better", "better.shown_first", "better.shown_second"]
    groups = read(root)
    for group in groups:
        assert group.components is not None
        assert group.rewards is not None
        k = group.group_size
        expected = [
            np.mean([0.5 if abs(i - j) == 1 else float(i > j) for j in range(k) if j != i])
            for i in range(k)
        ]
        np.testing.assert_allclose(group.rewards, expected)
        np.testing.assert_allclose(group.components[1:].mean(axis=0), expected)
        assert group.components[1, 0] == 1 / (k - 1)  # the smallest, shown first, wins against one
        assert group.components[2, 0] == 0
        if k == 4:
            np.testing.assert_allclose(group.rewards, np.array([0.5, 1, 2, 2.5]) / 3)
    assert result.counts == {"better.swayed_by_order": sum(g.group_size - 1 for g in groups)}
    assert len(answers(root)) == sum(g.group_size * (g.group_size - 1) for g in groups)


@given(st.integers(2, 12), st.integers(1, 12), st.text(max_size=4))
def test_everybody_meets_as_many_others(size: int, opponents: int, group: str) -> None:
    """At least `opponents`, all the same number, and one more only where it cannot come out even:
    an odd number each of an odd number of responses.
    """
    pairs = pairs_of(size, opponents, group)
    degrees = Counter(i for pair in pairs for i in pair)
    wanted = min(opponents, size - 1)
    assert set(degrees.values()) == {wanted + (wanted % 2 and size % 2)}
    assert len(degrees) == size
    assert len(set(pairs)) == len(pairs)
    assert all(i < j for i, j in pairs)
    assert pairs_of(size, None, group) == pairs_of(size, size, group)


@given(st.integers(2, 6), st.data())
def test_win_rates_add_up(size: int, data: st.DataObject) -> None:
    """Every verdict is shared out: with all pairs the mean is 1/2, and orders average."""
    verdict = st.sampled_from([0.0, 0.5, 1.0])
    wins = {(i, j): data.draw(verdict) for i in range(size) for j in range(size) if i != j}
    mean, first, second = win_rates(size, wins)
    assert mean.mean() == pytest.approx(0.5)
    np.testing.assert_allclose(mean, (first + second) / 2)
    won = [
        sum(wins[0, j] + 1 - wins[j, 0] for j in range(1, size)) / (2 * (size - 1)),
        sum(wins[0, j] for j in range(1, size)) / (size - 1),
    ]
    assert [mean[0], first[0]] == pytest.approx(won)


# ---- faults ----


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("prose", "no judgement in the answer …Both are fine."),
        ("empty", "an empty text"),
        ("off", "the rating '11', which is not a number from 1 to 10"),
        ("fraction", "no judgement"),
        ("length", "cut at 1024 tokens"),
        ("json", "not JSON"),
        ("500", "HTTP 500"),
        ("429", "HTTP 429"),
        ("400", "HTTP 400"),
        ("drop", "connection"),
        ("hang", "no answer within 2 s"),
    ],
)
def test_failed_questions_are_asked_again_alone(
    tmp_path: Path, served: JudgeServer, fault: str, cause: str
) -> None:
    """Of all questions one fails, and is counted; the next run asks that one and nothing else."""
    whole = answered_dataset(tmp_path / "whole", 4)
    reward(whole, {"a": judge(served)})
    asked, victim = len(served.asked), sorted(served.asked)[0]
    served.asked.clear()
    served.fault = lambda question, times: fault if question == victim else None
    root = answered_dataset(tmp_path / "data", 4)
    settings = judge(served, request_timeout=2.0 if fault == "hang" else 5.0)
    with pytest.raises(DataError, match=f"1 of {asked} failed: 1 x") as error:
        reward(root, {"a": settings})
    assert cause in str(error.value)
    assert served.asked.total() == asked - 1 + (1 if fault == "400" else 2)
    assert open_dataset(root, join=()).manifest.rewards == []
    (recorded,) = (row["error"] for row in answers(root) if row["error"])
    assert cause in recorded
    served.asked.clear()
    served.fault = lambda question, times: None
    reward(root, {"a": settings})
    assert dict(served.asked) == {victim: 1}
    assert sidecars(root) == sidecars(whole)


def test_gaps_can_be_left_missing(root: Path, served: JudgeServer) -> None:
    """What failed is asked no more, and has no number; a later run that fills it is a new version,
    for which that question alone is asked.
    """
    victim = "It is 4\n"  # response 1 of group 3, 2 of group 2, and so on
    served.fault = lambda question, times: "400" if victim in question else None
    with pytest.raises(DataError, match="HTTP 400"):
        reward(root, {"a": judge(served)})
    failures = sum(times for question, times in served.asked.items() if victim in question)
    served.asked.clear()
    result = reward(root, {"a": judge(served, gaps="missing")}, missing=0.0)
    assert not served.asked
    assert result.counts == {"a.failed": failures, "missing": failures}
    for group in read(root):
        assert group.components is not None
        gaps = [n == 4 for n in numbers_of(group)]
        assert np.isnan(group.components[0]).tolist() == gaps
    served.fault = lambda question, times: None
    assert reward(root, {"a": judge(served)}, missing=0.0).family.version == 2
    assert served.asked.total() == failures
    assert all(victim in question for question in served.asked)


def test_a_failed_comparison_leaves_its_pair_out(tmp_path: Path, served: JudgeServer) -> None:
    """Of k = 4 the pair of n and n + 3 fails in one order: n + 3 wins (1 + 1/2) / 2 of the rest."""
    root = answered_dataset(tmp_path / "data")
    group = next(g for g in _groups(root) if g.group_size == 4)
    first = numbers_of(group)[0]
    served.fault = lambda question, times: (
        "400" if shown_numbers(question) == [first, first + 3] else None
    )
    result = reward(root, {"a": judge(served, kind="judge_pairs", gaps="missing")})
    found = next(g for g in read(root) if g.group_id == group.group_id).rewards
    assert found is not None
    np.testing.assert_allclose(found, [0.25, 1 / 3, 2 / 3, 0.75])
    assert result.counts["a.failed"] >= 1


def test_faults_that_pass_are_not_seen(root: Path, served: JudgeServer) -> None:
    """Each attempt has another seed: at temperature 0 the same one would get the same prose."""
    faults = ["prose", "500", "drop"]
    served.fault = lambda question, times: faults[times] if times < 3 else None
    reward(root, {"a": judge(served, max_attempts=4)})
    assert set(served.asked.values()) == {4}
    seeds = Counter(body["seed"] for body in served.bodies)
    assert seeds == dict.fromkeys(range(4), len(served.asked))


def test_what_no_question_can_mend_stops_the_run(root: Path, served: JudgeServer) -> None:
    served.fault = lambda question, times: "401"
    with pytest.raises(ConfigError, match=r"knows the model.*HTTP 401"):
        reward(root, {"a": judge(served)})
    with pytest.raises(ConfigError, match="NO_SUCH_KEY, which is not set"):
        reward(root, {"a": judge(served, api_key_env="NO_SUCH_KEY")})
    with pytest.raises(ConfigError, match="has no user, key or query"):
        reward(root, {"a": judge(served, base_url="http://me:secret@host/v1")})
    with pytest.raises(ConfigError, match="either pattern or json_field"):
        reward(root, {"a": judge(served, pattern="(.)", json_field="score")})


def test_the_key_is_sent_and_written_nowhere(
    root: Path, served: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the server quotes it."""
    monkeypatch.setenv("JUDGE_KEY", "very-secret")
    served.fault = lambda question, times: "500" if shown_numbers(question)[0] == 3 else None
    settings = judge(served, api_key_env="JUDGE_KEY", max_attempts=1)
    with pytest.raises(DataError, match=r"HTTP 500.*\*\*\*"):
        reward(root, {"a": settings})
    assert served.headers[0]["Authorization"] == "Bearer very-secret"
    for path in root.rglob("*"):
        assert not path.is_file() or b"very-secret" not in path.read_bytes()
    assert not any("very-secret" in (row["error"] or "") for row in answers(root))


def test_two_models_do_not_judge_one_group(root: Path, served: JudgeServer) -> None:
    served.model = lambda question: f"tiny-{shown_numbers(question)[0] % 2}"
    with pytest.raises(DataError, match=r"one model judges.*tiny-0, tiny-1.*exact version"):
        reward(root, {"a": judge(served)})


# ---- whoever does it, however it is cut off ----


def test_the_same_sidecars_on_workers_and_shards(tmp_path: Path, served: JudgeServer) -> None:
    roots = [answered_dataset(tmp_path / name) for name in ("one", "two", "shards")]
    scorers = {"a": judge(served)}
    reward(roots[0], scorers)
    reward(roots[1], scorers, engine={"workers": 2})
    config = RewardConfig(str(roots[2]), scorers=scorers)
    results = [
        run_reward(config, WorkerSettings(shard=f"{i}/2", show_progress=False)) for i in (0, 1, 0)
    ]
    assert [result is None for result in results] == [True, True, False]
    assert sidecars(roots[0]) == sidecars(roots[1]) == sidecars(roots[2])
    assert set(served.asked.values()) == {3}  # once for each dataset


def journalled(root: Path) -> set[str]:
    """The questions whose answers are on disk, by what identifies them."""
    found = {f"{row['group_id']}/{row['first']}" for row in answers(root) if row["error"] is None}
    for path in (root / "judgements").rglob("*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)["judgement"]
                found.add(f"{row['group_id']}/{row['first']}")
    return found


def test_killed_at_any_moment_no_answer_is_asked_for_twice(
    tmp_path: Path, served: JudgeServer, server: ForkServer
) -> None:
    whole = answered_dataset(tmp_path / "whole")
    scorers = {"a": judge(served, concurrency=2, template="#{{ prompt }} {{ response }}")}
    reward(whole, scorers)
    root = answered_dataset(tmp_path / "data")
    keys = {
        f"#{group.prompt} {text}": f"{group.group_id}/{i}"
        for group in _groups(root)
        for i, text in enumerate(group.responses or ())
    }
    assert set(keys) == set(served.asked)
    served.asked.clear()
    served.delay = 0.05
    argv = ["reward", "--dataset", root, "--scorers", json.dumps(scorers)]
    kills = 0
    for _ in range(3):
        on_disk = journalled(root)
        before = served.asked.copy()
        child = server.start(argv)
        goal = served.asked.total() + 9
        end = time.monotonic() + 30
        while served.asked.total() < goal and time.monotonic() < end:
            time.sleep(0.005)
        child.kill()
        kills += child.wait() != 0
        time.sleep(0.1)
        for question, times in (served.asked - before).items():
            assert times == 0 or keys[question] not in on_disk
    assert kills == 3
    assert len(journalled(root)) >= 15
    served.delay = 0.0
    status, output = server.run(argv)
    assert status == 0, output
    assert sidecars(root) == sidecars(whole)
    # Only what was under way at a kill, two at a time, was asked for more than once.
    assert served.asked.total() <= len(keys) + 2 * kills


def test_two_runs_at_a_time_are_harmless(
    tmp_path: Path, served: JudgeServer, server: ForkServer
) -> None:
    """They may both ask, and one dataset comes of it."""
    whole = answered_dataset(tmp_path / "whole", 8)
    scorers = {"a": judge(served, concurrency=4)}
    reward(whole, scorers)
    root = answered_dataset(tmp_path / "data", 8)
    served.delay = 0.05
    argv = ["reward", "--dataset", root, "--scorers", json.dumps(scorers)]
    children = [server.start(argv) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0], [child.output for child in children]
    (family,) = open_dataset(root, join=("reward",)).manifest.rewards
    assert family == open_dataset(whole, join=("reward",)).manifest.rewards[0]
    assert max(served.asked.values()) <= 3


def _groups(root: Path) -> list[Group]:
    dataset = open_dataset(root, join=())
    columns = ["prompt", "responses", "response_token_ids"]
    return [g for i in range(dataset.n_row_groups) for g in dataset.groups(i, columns)]


def test_a_command_with_failures_says_so_and_fails(
    root: Path, served: JudgeServer, server: ForkServer
) -> None:
    served.fault = lambda question, times: "prose" if shown_numbers(question)[0] == 3 else None
    status, output = server.run(
        ["reward", "--dataset", root, "--scorers", json.dumps({"a": judge(served)})]
    )
    assert status == 1
    assert f"of {len(served.asked)} failed: " in output
    assert "no judgement in the answer" in output


def test_a_journal_forgets_a_torn_line_and_refuses_a_damaged_one(tmp_path: Path) -> None:
    kept = [Judgement("g", i, None, seed=0, text=f"Score: {i}", value=float(i)) for i in range(3)]
    with Journal(tmp_path, "task") as journal:
        for judgement in kept:
            journal.add(judgement)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert list(Journal(tmp_path, "task").known.values()) == kept[:2]
    path.write_bytes(whole.replace(b"Score: 1", b"Score: 7"))
    with pytest.raises(IntegrityError, match=r"row 1: a line of a journal.*Remove the line"):
        Journal(tmp_path, "task")
    assert Journal(tmp_path, "task-1").known == {}


def test_texts_reach_the_judge_as_they_are_written(root: Path, tmp_path: Path) -> None:
    """A template is no YAML, whatever it looks like."""
    template = "# {{ prompt }}: {{ response }}"
    scorers = {"a": {"kind": "judge", **BASE, "template": template, "system": "{{ a }}"}}
    config = tmp_path / "reward.yaml"
    config.write_text(yaml.safe_dump({"scorers": scorers}))
    for flags in (["--scorers", json.dumps(scorers)], ["--config", str(config)]):
        values = cli._parse("reward", cli.COMMANDS["reward"], ["--dataset", str(root), *flags])
        assert values["scorers"] == scorers


# ---- rubrics ----

BASE: dict[str, Any] = {"model": "m", "base_url": "http://localhost/v1"}


def ratings(**settings: Any) -> Rubric:
    return Rubric(JudgeSettings(kind="judge", **BASE, **settings))


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Score: 7", 7.0),
        ("Reasons.\n**Score: 7.5**\n", 7.5),
        ("Score: 3? No.\nScore: 10.", 10.0),
        ("Score: 7/10", None),
        ("Score: 0", None),
        ("Score: 7\nOr so.", None),
        ("7", None),
        ("Score: seven", None),
    ],
)
def test_a_rating_is_read_strictly(answer: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(BadAnswerError):
            ratings().value(answer)
    else:
        assert ratings().value(answer) == value


def test_other_ways_to_read() -> None:
    assert ratings(pattern=r"<(\d+)>").value("<4> and <4>") == 4
    with pytest.raises(BadAnswerError, match="2 different judgements"):
        ratings(pattern=r"<(\d+)>").value("<4> and <5>")
    by_field = ratings(json_field="score", scale=(0, 1))
    assert by_field.value('```json\n{"score": 0.25, "why": "so"}\n```') == 0.25
    for bad in ('{"score": true}', '{"score": "high"}', '{"points": 1}', "0.5", "[1]", "no"):
        with pytest.raises(BadAnswerError):
            by_field.value(bad)
    pairs = Rubric(JudgePairsSettings(kind="judge_pairs", **BASE))
    said = ["Verdict: A", "So.\n**Verdict: B**", "Verdict: tie"]
    assert [pairs.value(text) for text in said] == [1.0, 0.0, 0.5]
    with pytest.raises(BadAnswerError):
        pairs.value("Verdict: A or B")


def test_templates_see_the_group_and_nothing_else(tmp_path: Path) -> None:
    """What a response says is text, even where it looks like a template."""
    path = tmp_path / "rubric.jinja"
    path.write_text("{{ prompt }}|{{ metadata.answer }}|{{ response }}|{{ messages[0].role }}")
    group = scoring_input(["{{ 1 + 1 }}", "b"], answer="4")
    asked = ratings(template=str(path)).messages(group, 0, None)
    assert asked == [{"role": "user", "content": "What?|4|{{ 1 + 1 }}|user"}]
    chat = [{"role": "system", "content": "Sums."}, {"role": "user", "content": "2 + 2?"}]
    text = ratings(template="{{ prompt }}").messages(scoring_input(["a"], chat), 0, None)[0][
        "content"
    ]
    assert text == "system: Sums.\n\nuser: 2 + 2?"
    pair = Rubric(JudgePairsSettings(kind="judge_pairs", **BASE)).messages(group, 1, 0)
    assert pair[0]["content"].index("\nb\n") < pair[0]["content"].index("{{ 1 + 1 }}")
    assert "from 1 (worst) to 10 (best)" in ratings().messages(group, 0, None)[0]["content"]
    with pytest.raises(DataError, match=r"row 3, group 'g'.*'nothing' is undefined"):
        ratings(template="{{ nothing }}").messages(group, 0, None)
    with pytest.raises(ConfigError, match="valid Jinja"):
        ratings(template="{% if %}")
    with pytest.raises(ConfigError, match="path of a file"):
        ratings(template="no.jinja")
