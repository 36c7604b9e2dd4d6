"""Formats of data sets of the hub: what rows become. Refused ones: test_formats_hub_bad.py."""

from __future__ import annotations

import itertools
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import hub_shapes as hub
from support.hub_shapes import TEXT, assistant, chat, fragments, save
from support.importing import config, read_groups

from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.nectar import win_rates
from gvpo_offline.importing.formats.shared.parts import weighted_sum
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.importer import import_log

KINDS = ("arrow", "parquet", "jsonl")


def prompt_of(fragment: Fragment) -> Any:
    return fragment.prompt if fragment.messages is None else json.loads(fragment.messages)


def read(fragment: Fragment) -> tuple[Any, list[str | None], list[float | None]]:
    assert fragment.rewards is not None
    return prompt_of(fragment), fragment.responses, list(fragment.rewards)


# --- preference -----------------------------------------------------------------------------------

BLUE, GREEN = "It is blue.", "It is green."
SKY = "What color is the sky?"
PAIRS: dict[str, tuple[datasets.Features, dict[str, Any], Any]] = {
    "texts": (hub.PAIR_TEXTS, {"prompt": SKY, "chosen": BLUE, "rejected": GREEN}, SKY),
    "texts, prompt repeated": (
        hub.PAIR_TEXTS_ALONE,
        {"chosen": f"{SKY} {BLUE}", "rejected": f"{SKY} {GREEN}"},
        # "It is" is shared too: without a mark nobody can tell that it is an answer's.
        f"{SKY} It is",
    ),
    "texts of turns": (
        hub.PAIR_TEXTS_ALONE,
        {
            "chosen": f"\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: {SKY}\n\nAssistant: {BLUE}",
            "rejected": f"\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: {SKY}\n\nAssistant: {GREEN}",
        },
        f"\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: {SKY}\n\nAssistant:",
    ),
    "messages": (
        hub.PAIR_MESSAGES,
        {"prompt": chat(SKY), "chosen": [assistant(BLUE)], "rejected": [assistant(GREEN)]},
        chat(SKY),
    ),
    "messages, prompt repeated": (
        hub.PAIR_MESSAGES,
        {"prompt": chat(SKY), "chosen": chat(SKY, BLUE), "rejected": chat(SKY, GREEN)},
        chat(SKY),
    ),
    "messages alone, three turns": (
        hub.PAIR_MESSAGES_ALONE,
        {"chosen": chat("hi", "yes?", SKY, BLUE), "rejected": chat("hi", "yes?", SKY, GREEN)},
        chat("hi", "yes?", SKY),
    ),
    "messages alone, same answer": (
        hub.PAIR_MESSAGES_ALONE,
        {"chosen": chat(SKY, BLUE), "rejected": chat(SKY, BLUE)},
        chat(SKY),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PAIRS)
def test_preference(tmp_path: Path, name: str, kind: str) -> None:
    features, row, prompt = PAIRS[name]
    (fragment,) = fragments(save(tmp_path / "log", features, [row], kind), "preference")
    found, responses, rewards = read(fragment)
    assert found == prompt
    assert rewards == [1.0, 0.0]
    if "same answer" in name:
        assert responses == [BLUE, BLUE]
    elif "turns" in name and isinstance(prompt, str):
        assert responses == [f" {BLUE}", f" {GREEN}"]
    elif name == "texts, prompt repeated":
        assert responses == [" blue.", " green."]
    else:
        assert responses == [BLUE, GREEN]


def test_preference_pairs_are_groups_but_scores_meet(tmp_path: Path) -> None:
    """Two pairs with one prompt: 1 and 0 compare within a pair, scores are on one scale."""
    rows = [hub.h4_row(SKY, BLUE, GREEN, (8.5, 2.0)), hub.h4_row(SKY, "Blue", "Red", (8.5, 8.5))]
    scored = fragments(save(tmp_path / "scored", hub.H4_BINARIZED, rows), "preference")
    assert [list(f.rewards or ()) for f in scored] == [[8.5, 2.0], [8.5, 8.5]]
    assert [f.group_id for f in scored] == [None, None]
    assert [prompt_of(f) for f in scored] == [chat(SKY), chat(SKY)]
    plain = save(
        tmp_path / "plain",
        hub.PAIR_TEXTS,
        [
            {"prompt": SKY, "chosen": BLUE, "rejected": GREEN},
            {"prompt": SKY, "chosen": GREEN, "rejected": "Red"},
        ],
    )
    first, second = (f.group_id for f in fragments(plain, "preference"))
    assert first is not None
    assert first != second


@given(st.text("ab ", min_size=1), st.text("ab "), st.text("ab "))
def test_text_pairs_lose_nothing(prompt: str, chosen: str, rejected: str) -> None:
    """Prompt and response together are the text, whatever it is that they begin with in common."""
    from gvpo_offline.errors import DataError
    from gvpo_offline.importing.formats.preference import _from_texts

    texts = (prompt + chosen, prompt + rejected)
    try:
        (found, _), pair = _from_texts(*texts, None)
    except DataError:
        assert chosen == rejected or not prompt.removesuffix(" ")
        return
    assert [f"{found}{response}" for response in pair] == list(texts)
    assert len(found or "") >= len(prompt) - 1


# --- unpaired -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_unpaired(tmp_path: Path, kind: str) -> None:
    texts = [
        {"prompt": SKY, "completion": BLUE, "label": True},
        {"prompt": SKY, "completion": GREEN, "label": False},
    ]
    path = save(tmp_path / "texts", hub.UNPAIRED_TEXTS, texts, kind)
    assert [read(f) for f in fragments(path, "unpaired")] == [
        (SKY, [BLUE], [1.0]),
        (SKY, [GREEN], [0.0]),
    ]
    messages = [{"prompt": chat(SKY), "completion": [assistant(BLUE)], "label": True}]
    path = save(tmp_path / "messages", hub.UNPAIRED_MESSAGES, messages, kind)
    assert [read(f) for f in fragments(path, "unpaired")] == [(chat(SKY), [BLUE], [1.0])]


# --- ultrafeedback --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ultrafeedback(tmp_path: Path, kind: str) -> None:
    """The reward is overall_score; N/A is a missing rating. A 10 that was repaired stands."""
    completions = [
        hub.completion("alpaca-7b", "a", 7.5, ("4", "5", "N/A", "3"), 4.0),
        hub.completion("bard", "b", 10.0, ("3", "4", "4", "3"), 3.5),
    ]
    row = hub.ultrafeedback_row("Say cat", completions)
    path = save(tmp_path / "log", hub.ULTRAFEEDBACK, [row], kind)
    (fragment,) = fragments(path, "ultrafeedback")
    assert read(fragment) == (chat("Say cat"), ["a", "b"], [7.5, 10.0])
    assert fragment.samplers == ["alpaca-7b", "bard"]
    assert fragment.components == {
        "overall_score": [7.5, 10.0],
        "fine-grained_score": [4.0, 3.5],
        "helpfulness": [4.0, 3.0],
        "honesty": [5.0, 4.0],
        "instruction_following": [None, 4.0],
        "truthfulness": [3.0, 3.0],
    }
    (mean,) = fragments(path, "ultrafeedback", reward_weights={"fine-grained_score": 2.0})
    assert mean.rewards == [8.0, 7.0]
    (two,) = fragments(
        path, "ultrafeedback", reward_weights={"instruction_following": 0.5, "honesty": 1.0}
    )
    assert two.rewards == [5.0, 2.0 + 4.0]  # of the first only honesty is there


def test_ultrafeedback_first_release(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Of three 10s the aspects back one, 4.25 > 4. Not 4 = (4 + 4 + 4 + 4) / 4, not no rating."""
    completions = [
        hub.completion("a", "good", 10.0, ("4", "4", "4", "5")),
        hub.completion("b", "bad", 10.0, ("4", "4", "4", "4")),
        hub.completion("c", "bad", 10.0, ("N/A", "N/A", "N/A", "N/A")),
        hub.completion("d", "fair", 6.0, ("1", "1", "1", "1")),
    ]
    row = hub.ultrafeedback_row("Say cat", completions)
    empty = hub.ultrafeedback_row("Say dog", [])
    path = save(tmp_path / "log", hub.ULTRAFEEDBACK_FIRST_RELEASE, [row, empty])
    # A reward that does not use the score has no use for doubts about it.
    aspects = fragments(path, "ultrafeedback", reward_weights={"helpfulness": 1.0})
    assert aspects[0].rewards == [4.0, 4.0, None, 1.0]
    result = import_log(
        config(
            path,
            tmp_path / "out",
            format="ultrafeedback",
            missing_rewards="drop",
            singletons="drop",
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        )
    )
    (group,) = read_groups(tmp_path / "out")
    assert group.samplers == ("a", "d")
    assert group.rewards is not None
    assert group.rewards.tolist() == [10.0, 6.0]
    assert result.counts["dropped_unrewarded_responses"] == 2
    assert result.counts["dropped_groups_without_responses"] == 1
    assert "  2 responses without a reward were dropped (missing_rewards: drop)" in result.lines()


# --- armorm, nectar -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_armorm(tmp_path: Path, kind: str) -> None:
    scores = [0.15, 0.175, 0.0625, 0.15, 0.125]
    row = {
        "prompt_id": "x",
        "prompt": SKY,
        "all_generated_responses": list("abcde"),
        "all_rm_scores": scores,
        "chosen": chat(SKY, "b"),
        "rejected": chat(SKY, "c"),
    }
    path = save(tmp_path / "log", hub.ARMORM, [row], kind)
    (fragment,) = fragments(path, "armorm")
    assert read(fragment) == (chat(SKY), list("abcde"), scores)


@pytest.mark.parametrize("kind", KINDS)
def test_nectar(tmp_path: Path, kind: str) -> None:
    """Of k = 3 answers, rank 1 beats 2 of 2 others, rank 2 one, rank 3 none."""
    answers: list[tuple[str, float | None]] = [("best", 1.0), ("worst", 3.0), ("fair", 2.0)]
    rows = [
        hub.nectar_row(f"\n\nHuman: {SKY}\n\nAssistant: ", answers),
        hub.nectar_row(
            "\n\nHuman: hi\n\nAssistant: yes?\nSo?\n\nHuman: why\n\nAssistant:", answers
        ),
    ]
    path = save(tmp_path / "log", hub.NECTAR, rows, kind)
    one, three = fragments(path, "nectar")
    assert read(one) == (chat(SKY), ["best", "worst", "fair"], [1.0, 0.0, 0.5])
    assert prompt_of(three) == chat("hi", "yes?\nSo?", "why")
    assert one.samplers == ["m0", "m1", "m2"]


def test_nectar_rows_with_one_prompt_stay_apart(tmp_path: Path) -> None:
    """Ranks compare the answers of a row: across rows they mean nothing."""
    prompt = f"\n\nHuman: {SKY}\n\nAssistant: "
    rows = [hub.nectar_row(prompt, [(a, 1.0), (b, 2.0)]) for a, b in ("ab", "bc")]
    ids = {f.group_id for f in fragments(save(tmp_path / "log", hub.NECTAR, rows), "nectar")}
    assert len(ids) == 2


def test_a_lone_ranked_answer_has_no_reward(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """The only ranked answer of a row is compared with nothing: its reward is missing, as that of
    an answer without a rank is, and `missing_rewards` decides what happens to the responses.
    """
    lone = hub.nectar_row(f"\n\nHuman: {SKY}\n\nAssistant: ", [("a", 3.0), ("b", None)])
    two = hub.nectar_row("\n\nHuman: hi\n\nAssistant: ", [("c", 1.0), ("d", 2.0)])
    path = save(tmp_path / "log", hub.NECTAR, [lone, two])
    found = [list(fragment.rewards or ()) for fragment in fragments(path, "nectar")]
    assert found == [[None, None], [1.0, 0.0]]
    options: dict[str, Any] = {
        "format": "nectar",
        "singletons": "drop",
        "tokenizer_name_or_path": str(tiny_tokenizer_dir),
    }
    with pytest.raises(DataError, match=r"each response has one.*none for response 0"):
        import_log(config(path, tmp_path / "refused", **options))
    result = import_log(config(path, tmp_path / "out", missing_rewards="drop", **options))
    (group,) = read_groups(tmp_path / "out")
    assert group.responses == ("c", "d")
    assert result.counts["dropped_unrewarded_responses"] == 2
    assert result.counts["dropped_groups_without_responses"] == 1


@given(st.permutations(range(1, 8)))
def test_win_rates_without_ties(ranks: list[int]) -> None:
    """(k - rank) / (k - 1), here with k = 7."""
    assert win_rates([float(r) for r in ranks]) == pytest.approx([(7 - r) / 6 for r in ranks])


@given(st.lists(st.one_of(st.none(), st.integers(1, 4).map(float)), max_size=7))
def test_win_rates_are_shares_of_pairs(ranks: list[float | None]) -> None:
    """Each pair gives away one point, so they add up to k / 2 = k (k - 1) / 2 / (k - 1)."""
    rates = win_rates(ranks)
    lone = sum(rank is not None for rank in ranks) == 1
    assert [rate is None for rate in rates] == [rank is None or lone for rank in ranks]
    given_rates = [rate for rate in rates if rate is not None]
    assert sum(given_rates) == pytest.approx(len(given_rates) / 2)
    for (a, rate_a), (b, rate_b) in itertools.combinations(zip(ranks, rates, strict=True), 2):
        if a is not None and b is not None:
            assert rate_a is not None
            assert rate_b is not None
            assert (a < b) == (rate_a > rate_b)


# --- helpsteer2, helpsteer3 -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_helpsteer2(tmp_path: Path, kind: str) -> None:
    """3 x 0.65 + 4 x 0.8 + 4 x 0.45 + 2 x 0.55 - 1 x 0.4 = 7.65."""
    turns = "hi\n<extra_id_1>Assistant\nyes?\n\nSo?\n<extra_id_1>User\nwhy"
    rows = [
        hub.helpsteer2_row("c#", "C# is a language.", (3, 4, 4, 2, 1)),
        hub.helpsteer2_row(turns, "So.", (0, 0, 0, 0, 4)),
    ]
    path = save(tmp_path / "log", hub.HELPSTEER2, rows, kind)
    one, three = fragments(path, "helpsteer2")
    assert read(one) == (chat("c#"), ["C# is a language."], [pytest.approx(7.65)])
    assert one.components == {
        "helpfulness": [3.0],
        "correctness": [4.0],
        "coherence": [4.0],
        "complexity": [2.0],
        "verbosity": [1.0],
    }
    assert read(three) == (chat("hi", "yes?\n\nSo?", "why"), ["So."], [pytest.approx(-1.6)])
    weights = {"helpfulness": 1.0, "verbosity": -0.5}
    helpful = fragments(path, "helpsteer2", reward_weights=weights)
    assert [f.rewards for f in helpful] == [[2.5], [-2.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_helpsteer3(tmp_path: Path, kind: str) -> None:
    """-3: response 1 is much better. The rewards lie as far apart as the preference says."""
    rows = [hub.helpsteer3_row(preference) for preference in (-3, 1, 0)]
    found = fragments(save(tmp_path / "log", hub.HELPSTEER3, rows, kind), "helpsteer3")
    assert [f.rewards for f in found] == [[1.5, -1.5], [-0.5, 0.5], [0.0, 0.0]]
    assert prompt_of(found[0]) == chat("hi", "hello", "which?")
    assert found[0].responses == ["one", "two"]


# --- openr1_math, synthetic1 ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_openr1_math(tmp_path: Path, kind: str) -> None:
    """Right if math-verify or the judge says so; a verdict that nobody gave is missing."""
    rows = [
        hub.openr1_row(["5", "6"], [True, False], finish=["stop", "length"]),
        hub.openr1_row(["five", "six", "?"], [False, False, False], [True, False, None]),
        hub.openr1_row(["five", "six"], [], [True, None]),
    ]
    found = fragments(save(tmp_path / "log", hub.OPENR1, rows, kind), "openr1_math")
    assert read(found[0]) == (chat("2 + 3?"), ["5", "6"], [1.0, 0.0])
    assert [f.truncated for f in found] == [[False, True], [False] * 3, [False] * 2]
    assert [f.rewards for f in found[1:]] == [[1.0, 0.0, 0.0], [1.0, None]]
    assert found[1].components == {
        "correct": [1.0, 0.0, 0.0],
        "math_verify": [0.0, 0.0, 0.0],
        "llama": [1.0, 0.0, None],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic1(tmp_path: Path, kind: str) -> None:
    rows = [hub.synthetic1_row("vfm_1", "a", 1.0), hub.synthetic1_row("vfm_1", "b", None)]
    path = save(tmp_path / "log", hub.SYNTHETIC1, rows, kind)
    found = fragments(path, "synthetic1")
    assert [read(f) for f in found] == [
        (chat("Solve vfm_1."), ["a"], [1.0]),
        (chat("Solve vfm_1."), ["b"], [None]),
    ]
    assert [(f.group_id, f.response_ids) for f in found] == [
        ("vfm_1", ["vfm_1_a"]),
        ("vfm_1", ["vfm_1_b"]),
    ]


# --- distilabel, arena ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_distilabel(tmp_path: Path, kind: str) -> None:
    """Ratings as text with N/A, as integers, and none at all where the judge's answer was lost."""
    text = save(
        tmp_path / "text", hub.distilabel(TEXT), [hub.distilabel_row(["5", "N/A", "2.5"])], kind
    )
    (fragment,) = fragments(text, "distilabel")
    assert read(fragment) == (chat("Say cat"), ["a", "b", "c"], [5.0, None, 2.5])
    assert fragment.samplers == ["m0", "m1", "m2"]
    rows = [
        hub.distilabel_row([1, 2, None], ["a", None, "c"], "model_names"),
        hub.distilabel_row(None, models="model_names"),
    ]
    integers = save(tmp_path / "integers", hub.distilabel(hub.INT, "model_names"), rows, kind)
    some, none = fragments(integers, "distilabel")
    assert read(some)[1:] == (["a", "", "c"], [1.0, 2.0, None])
    assert none.rewards == [None] * 3
    assert none.samplers == ["m0", "m1", "m2"]


def test_arena(tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's file is a CSV, which `datasets` reads. Battle 3 has a past of its own per model."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        hub.arena_row(1, '["hi"]', '["a \\u00e9"]', '["b"]', (1, 0, 0)),
        hub.arena_row(2, '["hi"]', '["c"]', '["d"]', (0, 0, 1)),
        hub.arena_row(3, '["hi","more"]', '["a1","a2"]', '["b1","b2"]', (0, 1, 0)),
        hub.arena_row(4, '["hi","more"]', '["same","a2"]', '["same",null]', (1, 0, 0)),
    ]
    (tmp_path / "arena").mkdir()
    data = datasets.Dataset.from_list(rows, features=hub.ARENA)
    data.to_csv(tmp_path / "arena" / "train.csv")
    result = import_log(
        config(
            f"hf:{tmp_path / 'arena'}",
            tmp_path / "out",
            format="arena",
            singletons="drop",
            empty_responses="keep",
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        )
    )
    found = {g.group_id: g for g in read_groups(tmp_path / "out")}
    assert {name: list(g.rewards) for name, g in found.items() if g.rewards is not None} == {
        "1": [1.0, 0.0],
        "2": [0.5, 0.5],
        "4": [1.0, 0.0],
    }
    assert found["1"].responses == ("a é", "b")
    assert found["1"].samplers == ("gpt-4", "vicuna")
    assert json.loads(found["4"].messages or "") == chat("hi", "same", "more")
    assert found["4"].responses == ("a2", "")
    assert result.counts["dropped_singletons"] == 2  # a2 and b2 of battle 3


# --- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(hub.WHOLE) - {"arena"}))
def test_whole_import_from_each_kind_of_file(
    tmp_path: Path, tiny_tokenizer_dir: Path, name: str
) -> None:
    """Saved, as Parquet and as JSON lines a data set becomes the same groups."""
    features, rows, n_groups = hub.WHOLE[name]
    found = []
    for kind in KINDS:
        path = save(tmp_path / kind / "log", features, rows, kind)
        settings = config(
            path,
            tmp_path / kind / "out",
            format=name,
            source="hub",
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        )
        assert import_log(settings).counts["groups"] == n_groups
        found.append([repr(astuple(group)) for group in read_groups(tmp_path / kind / "out")])
    assert found[0] == found[1] == found[2]
    kept = settings.columns.keep = [next(iter(features))]
    settings.output_dir = str(tmp_path / "kept")
    import_log(settings)
    for group in read_groups(tmp_path / "kept"):
        assert list(json.loads(group.metadata or "")) == kept


@given(
    st.integers(0, 4).flatmap(
        lambda n: st.dictionaries(
            st.sampled_from("abc"),
            st.lists(st.one_of(st.none(), st.floats(-9, 9)), min_size=n, max_size=n),
            min_size=3,
        )
    ),
    st.dictionaries(st.sampled_from("abc"), st.floats(-2, 2)),
)
def test_weighted_sum(parts: dict[str, list[float | None]], weights: dict[str, float]) -> None:
    """A part that is missing adds nothing; where all are, the reward is missing, not 0."""
    n = len(parts["a"])
    rewards = weighted_sum(parts, weights, n)
    assert len(rewards) == n
    for i, reward in enumerate(rewards):
        there = {k for k, w in weights.items() if w and parts[k][i] is not None}
        assert (reward is None) == (not there)
        if reward is not None:
            terms = [w * (parts[k][i] or 0.0) for k, w in weights.items()]
            assert reward == pytest.approx(sum(terms))
    assert weighted_sum(parts, {}, n) == [None] * n
