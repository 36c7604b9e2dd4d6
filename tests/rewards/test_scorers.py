"""Scorers one by one: what they make of a group, and what they refuse."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rewarding import answered_dataset, functions, read, reward, scoring_input

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.functions import TrlScorer, VerlScorer, load_function
from gvpo_offline.rewards.kinds import (
    ExactSettings,
    FunctionSettings,
    MathSettings,
    NumericSettings,
    RewardModelSettings,
    VerlSettings,
)
from gvpo_offline.rewards.match import ExactScorer, NumericScorer, last_number
from gvpo_offline.rewards.maths import MathScorer, is_formula
from gvpo_offline.rewards.model import ModelScorer
from gvpo_offline.rewards.scorer import Scorer
from gvpo_offline.rewards.settings import RewardConfig

NAN = float("nan")


def score(scorer: Scorer, *groups: ScoringInput) -> list[list[list[float]]]:
    """What a scorer says, started in another process, as far as pickling goes."""
    scorer.identity()
    copied: Scorer = pickle.loads(pickle.dumps(scorer))
    copied.start()
    try:
        found = [numbers.tolist() for numbers in copied.score(groups)]
        scorer.counts.update(copied.counts)
        return found
    finally:
        copied.stop()


# ---- texts and numbers ----


def test_exact_texts_are_the_same_but_for_space_around_them() -> None:
    settings = ExactSettings(kind="exact", column="answer")
    found = score(
        ExactScorer(settings), scoring_input([" blue\n", "Blue", "blue sky"], answer="blue")
    )
    assert found == [[[1, 0, 0]]]
    careless = settings.model_copy(update={"ignore_case": True})
    assert score(ExactScorer(careless), scoring_input(["Blue"], answer="blue")) == [[[1]]]


def test_a_pattern_finds_the_answer_in_response_and_column() -> None:
    """The last match counts; a response without one is wrong, a column without one is bare."""
    settings = ExactSettings(kind="exact", column="a", pattern=r"#### *(.*)")
    texts = ["#### 4\n#### 5", "#### 5\n#### 4", "5"]
    assert score(ExactScorer(settings), scoring_input(texts, a="2+3\n#### 5")) == [[[1, 0, 0]]]
    assert score(ExactScorer(settings), scoring_input(texts, a=5)) == [[[1, 0, 0]]]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 16 - 9 = 7.", 7),
        ("$1,234.50 in all", 1234.5),
        ("1,2", 2),
        ("from 5-3", 3),
        ("it is -3", -3),
        ("1.5e3", 1500),
        (".5", 0.5),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**15), 10**15))
def test_any_number_is_read_as_it_was_written(real: float, whole: int) -> None:
    assert last_number(f"I say 1 and {real}.") == real
    assert last_number(f"is {whole:,}") == whole


def test_numbers_within_a_tolerance() -> None:
    """2/3 to six digits is close enough for 1e-6, to three it is not; a null, or no number, in the
    column is no right answer at all.
    """
    settings = NumericSettings(kind="numeric", column="answer")
    groups = [
        scoring_input(["0.6666667", "0.667", "none"], answer=2 / 3),
        scoring_input(["A: 18", "1,8"], answer="9 * 2 = 18\nA: 18"),
        scoring_input(["1", "2"], answer=None),
        scoring_input(["1", "2"], answer="unknown"),
    ]
    found = score(NumericScorer(settings), *groups)
    np.testing.assert_array_equal(found[0], [[1, 0, 0]])
    np.testing.assert_array_equal(found[1], [[1, 0]])
    np.testing.assert_array_equal(found[2:], [[[NAN, NAN]]] * 2)


def test_a_column_that_the_group_has_not() -> None:
    """A way through nested columns is one too; what there is, is named."""
    settings = NumericSettings(kind="numeric", column="reward_model.ground_truth")
    nested = scoring_input(["4"], reward_model={"ground_truth": "4"})
    assert score(NumericScorer(settings), nested) == [[[1]]]
    with pytest.raises(DataError, match=r"f, row 3, group 'g'.*ground_truth; received answer, l"):
        score(NumericScorer(settings), scoring_input(["4"], answer="4", level=1))


# ---- math-verify ----


def maths(**settings: Any) -> MathScorer:
    return MathScorer(MathSettings(kind="math", **{"column": "answer", **settings}))


def test_answers_are_compared_as_mathematics() -> None:
    """The gold one first: a solution counts as the equation that it solves, not the reverse."""
    groups = [
        scoring_input([r"So it is $\frac{2}{4}$", "It is 0.5", r"\boxed{1/3}", "I do not know"],
             answer=r"\frac{1}{2}"),
        scoring_input(["$x=2$", "$2$"], answer="2"),
        scoring_input(["1"], answer=None),
        scoring_input([r"$\{1,2\}$", r"$\{2,1\}$"], answer=r"\{2, 1\}"),
    ]  # fmt: skip
    found = score(maths(), *groups)
    assert found[0] == [[1, 1, 0, 0]]
    assert found[1] == [[1, 1]]
    np.testing.assert_array_equal(found[2], [[NAN]])
    assert found[3] == [[1, 1]]


@pytest.mark.parametrize(
    ("answer", "formula"),
    [
        (r"2\pi", True), ("3x+2", True), (r"10\text{ metres}", True), (r"\$18", True),
        ("sin(x)", True), ("18 eggs", False), (r"$2\pi$", False), (r"so \boxed{2}", False),
        ("9 * 2\n18", False),
    ],
)  # fmt: skip
def test_a_gold_answer_alone_is_a_formula(answer: str, formula: bool) -> None:
    """Read as a text, the gold answer 2 pi would be 2, and 1 1/2 would be 1/2."""
    assert is_formula(answer) == formula


def test_formulas_that_stand_alone_are_read_whole() -> None:
    golds = {r"2\pi": r"$2\pi$", r"1\frac{1}{2}": "1.5", "3x+2": "$2+3x$", "18 eggs": "18"}
    groups = [
        scoring_input([right, "2", "$1/2$", "3"], answer=gold) for gold, right in golds.items()
    ]
    assert score(maths(), *groups) == [[[1, 0, 0, 0]]] * 4


def test_a_pattern_says_where_the_answer_is() -> None:
    """Without it, what stands between two amounts in dollars reads as a formula."""
    text = "That is $4.00 + $2.00, she answered 30 times\nA: 6"
    marked = maths(pattern=r"A: *(.*)")
    assert score(marked, scoring_input([text, r"A: \sqrt{36}", "6"], answer="6")) == [[[1, 1, 0]]]
    assert score(marked, scoring_input([r"A: (1,2)"], answer="(1,2)")) == [[[1]]]


@pytest.mark.parametrize(("on_failure", "number"), [(0.0, 0.0), (None, NAN)])
def test_a_comparison_that_hangs_is_killed(on_failure: float | None, number: float) -> None:
    """A power tower keeps one integer operation busy for longer than anybody waits: no alarm of
    the process itself gets through. The answer after it is compared as ever.
    """
    scorer = maths(timeout_s=1.0, on_failure=on_failure)
    texts = ["$2$", "$9^{9^{9^{9}}}$", "$2$"]
    np.testing.assert_array_equal(
        score(scorer, scoring_input(texts, answer="2")), [[[1, number, 1]]]
    )
    assert scorer.counts == {"timed_out": 1}


def test_a_process_that_dies_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = maths()
    assert scorer.score([scoring_input(["2"], answer="2")])[0].tolist() == [[1]]
    assert scorer._worker is not None
    scorer._worker._process.kill()
    assert scorer.score([scoring_input(["2", "2"], answer="2")])[0].tolist() == [[0, 1]]
    assert scorer.counts == {"broke_down": 1}
    scorer.stop()


def test_a_script_without_a_guard_is_told(tmp_path: Path) -> None:
    """A new process imports the script again, which must not begin everything anew."""
    script = tmp_path / "script.py"
    script.write_text(
        "from gvpo_offline.rewards.kinds import MathSettings\n"
        "from gvpo_offline.rewards.maths import MathScorer\n"
        "from gvpo_offline.rewards.cases import ScoringInput\n"
        "scoring_input = ScoringInput('g', 'p', None, ('1',), {'a': '1'})\n"
        "print(MathScorer(MathSettings(kind='math', column='a')).score([scoring_input]))\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "that starts workers under `if __name__ == '__main__':`" in done.stderr


def test_math_names_the_version_that_verified() -> None:
    import math_verify  # noqa: F401 - it is installed

    assert maths().identity()["math_verify"]


# ---- functions ----


def trl(path: str, name: str) -> TrlScorer:
    return TrlScorer(FunctionSettings(kind="function", function=f"{path}:{name}"))


def test_trl_functions_as_they_are(tmp_path: Path) -> None:
    path = functions(tmp_path)
    one = scoring_input(["is 4", "is 5!"], answer="4")
    assert score(trl(path, "length"), one) == [[[4, 5]]]
    assert score(trl(path, "right"), one) == [[[1, 0]]]
    np.testing.assert_array_equal(
        score(trl(path, "right"), scoring_input(["4"], answer=None)), [[[NAN]]]
    )
    chat = [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief"}]
    # Two messages, eight letters, and one for the role.
    assert score(trl(path, "chat"), scoring_input(["Hi there"], prompt=chat)) == [[[11]]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "raises",
            r"raises must not raise; .*rewards\.py, line 22, .*KeyError: 'solution'",
        ),
        ("exits", r"exits must not raise; received .*rewards\.py, line 25, .*SystemExit: 3"),
        ("right", r"right must not raise; received .*rewards\.py, line 10: TypeError.*'answer'"),
        ("short", "one number, or None, per response; received .1.0. for 2 responses"),
        ("one_number", "one number, or None, per response; received 1.0 for 2"),
        ("nan", "finite number, or None, per response; received nan for response 1"),
        ("words", "finite number, or None, per response; received 'good' for response 0"),
    ],
)
def test_functions_that_do_not_keep_the_bargain(tmp_path: Path, name: str, message: str) -> None:
    path = functions(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        score(trl(path, name), scoring_input(["a", "b"]))
    assert (error.value.file, error.value.row, error.value.group) == ("f", 3, "g")
    assert f"{path}:{name}" in str(error.value)


def test_verl_functions_as_they_are(tmp_path: Path) -> None:
    path = functions(tmp_path)
    columns = {"data_source": "gsm8k", "reward_model": {"ground_truth": "4"}}
    one = scoring_input(["is 4", "is five"], **columns, extra_info={"index": 7})

    def verl(name: str, **changes: Any) -> VerlScorer:
        return VerlScorer(VerlSettings(kind="verl", function=f"{path}:{name}", **changes))

    assert score(verl("compute_score"), one) == [[[1, 0]]]
    kept = verl("compute_score", keep=["length", "index"])
    assert kept.extra_components == ("length", "index")
    assert score(kept, one) == [[[1, 0], [4, 7], [7, 7]]]
    flat = verl("plain_score", ground_truth="answer")
    assert score(flat, scoring_input(["4", "5"], answer="4")) == [[[1, 0]]]
    with pytest.raises(DataError, match=r"number as source, or None.*'gsm8k' for response 0"):
        score(verl("compute_score", keep=["source"]), one)


def test_a_function_is_told_apart_by_its_code(tmp_path: Path) -> None:
    path = functions(tmp_path)
    before = trl(path, "length").identity()
    assert trl(path, "length").identity() == before
    functions(tmp_path, "def length(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    assert trl(path, "length").identity()["source_sha256"] != before["source_sha256"]
    assert load_function("json:dumps")({}) == "{}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:f", "FileNotFoundError"),
        ("no_such_module:f", "ModuleNotFoundError"),
        ("json:nothing", "AttributeError"),
        ("json", "module:name or path.py:name"),
        ("json:__name__", "json:__name__, a str"),
    ],
)
def test_functions_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_function(name)


# ---- reward models ----


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A Qwen3 of seeded random weights with a head of one label, and a tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

    folder = tmp_path_factory.mktemp("reward-model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=96,
        num_labels=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForSequenceClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def classifier(path: Path, **settings: Any) -> ModelScorer:
    given = {"kind": "model", "model_name_or_path": str(path), "use_cpu": True, **settings}
    return ModelScorer(RewardModelSettings(**given))


def test_a_reward_model_scores_prompt_and_response(reward_model: Path) -> None:
    """Each by itself, in one batch, and in batches of 40 tokens: the same numbers."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    chat = [{"role": "user", "content": "Say hello"}]
    groups = [
        scoring_input(["Hello!", "0 1 2 3 4 5 6 7 8 9", ""], prompt=chat),
        scoring_input(["cat", "5"]),
    ]
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    expected = []
    for one in groups:
        for text in one.responses:
            messages = [*one.conversation, {"role": "assistant", "content": text}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
            with torch.no_grad():
                expected.append(float(model(ids["input_ids"]).logits[0, 0]))
    assert len({round(value, 3) for value in expected}) == 5
    for budget in (10_000, 40):
        found = score(classifier(reward_model, max_tokens_per_batch=budget), *groups)
        flat = [number for numbers in found for number in numbers[0]]
        np.testing.assert_allclose(flat, expected, atol=1e-5)


def test_a_reward_model_in_the_stage(reward_model: Path, tmp_path: Path) -> None:
    """What the scorer says of each group; the second run finds it by the weights' hash."""
    root = answered_dataset(tmp_path / "data", n_groups=8)
    settings = {"kind": "model", "model_name_or_path": str(reward_model), "use_cpu": True}
    result = reward(root, {"rm": settings})
    for group in read(root):
        number = int(group.group_id[-5:])
        alone = scoring_input(group.responses or (), prompt=f"What is {number} + 1?")
        np.testing.assert_allclose(
            group.rewards, score(classifier(reward_model), alone)[0][0], atol=1e-5
        )
    moved = shutil.copytree(reward_model, tmp_path / "moved")
    again = reward(root, {"rm": {**settings, "model_name_or_path": str(moved)}})
    assert again.family == result.family


def test_a_prompt_that_is_text_may_stay_text(reward_model: Path) -> None:
    with_turns = score(classifier(reward_model), scoring_input(["cat"]))
    without = score(classifier(reward_model, as_chat=False), scoring_input(["cat"]))
    assert abs(with_turns[0][0][0] - without[0][0][0]) > 1e-3


def test_a_reward_model_is_told_apart_by_its_weights(reward_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    model.score.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(reward_model).save_pretrained(tmp_path)
    one, other = (classifier(path).identity() for path in (reward_model, tmp_path))
    assert one["tokenizer_fingerprint"] == other["tokenizer_fingerprint"]
    assert one["weights_sha256"] != other["weights_sha256"]


def test_what_a_reward_model_refuses(
    reward_model: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with pytest.raises(
        DataError, match=r"fit into the reward model's 96 positions.*tokens"
    ) as error:
        score(classifier(reward_model), scoring_input(["cat " * 100]))
    assert error.value.group == "g"
    with pytest.raises(ConfigError, match=r"no score\.weight"):  # a model without a classifier
        classifier(tiny_model_dir).identity()
    two = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=2)
    two.save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"has one label; received .* with 2"):
        classifier(tmp_path / "two").identity()
    with pytest.raises(ConfigError, match="nowhere"):
        classifier(tmp_path / "nowhere").identity()


# ---- settings ----


@pytest.mark.parametrize(
    ("scorers", "message"),
    [
        ({}, "scorers must be set"),
        ({"a b": {"kind": "math", "column": "x"}}, "the name of a scorer"),
        ({"a.b": {"kind": "math", "column": "x"}}, "contains no dot; received a.b"),
        ({"a": {"column": "x"}}, "scorers.a: .*kind"),
        ({"a": {"kind": "oracle"}}, "scorers.a: .*'oracle'"),
        ({"a": {"kind": "math"}}, "scorers.a.math.column: .*required"),
        ({"a": {"kind": "math", "column": "x", "colum": 1}}, "scorers.a.math.colum: "),
        ({"a": {"kind": "exact", "column": "x", "pattern": "("}}, "not a regular expression"),
        ({"a": {"kind": "math", "column": "x", "weight": NAN}}, "scorers.a.math.weight: .*finite"),
    ],
)
def test_settings_that_mean_nothing(scorers: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardConfig("data", scorers=scorers).settings()
