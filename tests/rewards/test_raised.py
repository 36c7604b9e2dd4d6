"""Errors of the user's reward code name its file and line, the group and the response."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from support.judging import JudgeServer, judge
from support.rewarding import answered_dataset, reward, scoring_input

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.rewards.build import build_fresh_scorer
from gvpo_offline.rewards.functions import load_function
from gvpo_offline.rewards.kinds import FunctionSettings, JudgeSettings, VerlSettings
from gvpo_offline.rewards.raised import place_of

# Line 4 is the one that raises; line 8 calls it.
RAISES = """import json

def parsed(text):
    return json.loads(text)["score"]


def score(completions, **kwargs):
    return [parsed(text) for text in completions]


def lazily(completions, **kwargs):
    for text in completions:
        yield parsed(text)


def compute_score(data_source, solution_str, ground_truth, extra_info):
    if solution_str.endswith("1"):
        raise ValueError("two\\nlines")
    return 0.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(RAISES)
    return path


@pytest.mark.parametrize("name", ["score", "lazily"])
def test_the_line_that_raised_is_named(file: Path, name: str) -> None:
    """The last line of the file of the user, although the json module raised."""
    scorer = build_fresh_scorer(FunctionSettings(kind="function", function=f"{file}:{name}"))
    scorer.start()
    with pytest.raises(DataError) as error:
        scorer.score([scoring_input(['{"score": 1}', "no JSON"])])
    text = str(error.value)
    assert "f, row 3, group 'g': the reward function" in text
    assert f"received {file}, line 4, in parsed: JSONDecodeError: Expecting value" in text
    caller = 8 if name == "score" else 13
    lines = error.value.lines()
    assert f"{file}, line {caller}, in " in lines[1]
    assert f'{file}, line 4, in parsed: return json.loads(text)["score"]' in lines
    assert lines[-1].startswith("JSONDecodeError: Expecting value")
    assert not any("functions.py, line" in line for line in lines)


def test_a_function_of_one_response_names_the_response(tmp_path: Path, file: Path) -> None:
    """In a worker process too: response 0 of group 1 is "It is 1"."""
    root = answered_dataset(tmp_path / "data", 16)
    settings = {"kind": "verl", "function": f"{file}:compute_score", "ground_truth": "answer"}
    with pytest.raises(DataError) as error:
        reward(root, {"a": settings}, {"workers": 2})
    lines = error.value.lines()
    assert "must not raise (response " in lines[0]
    assert f"{file}, line 18, in compute_score: ValueError: two lines" in lines[0]
    assert error.value.group is not None
    assert lines[1] == f'{file}, line 18, in compute_score: raise ValueError("two\\nlines")'
    VerlSettings(**settings)


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("import os\nimport no_such_module\n", "line 2", "ModuleNotFoundError"),
        ("def score(:\n    pass\n", "line 1", "SyntaxError"),
        ("import sys\nx = 1\n\nsys.exit('usage: …')\n", "line 4", "SystemExit: usage"),
        ("TABLE = {}\nscore = TABLE['score']\n", "line 2", "KeyError: 'score'"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path: Path, text: str, place: str, what: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match="module:name or path") as error:
        load_function(f"{path}:score")
    assert f"{path}, {place}" in str(error.value)
    assert what in error.value.lines()[-1]
    assert "Correct the file" in str(error.value)


def test_a_name_that_the_file_lacks_is_a_setting(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no attribute 'scores'.*the setting `function`"):
        load_function(f"{file}:scores")


def test_what_has_no_source_of_its_own_can_be_a_function(tmp_path: Path, file: Path) -> None:
    """A partial, an object that can be called, and a built-in function have an identity."""
    file.write_text(
        "import functools\n\ndef add(completions, more, **kwargs):\n"
        "    return [more for _ in completions]\n\n"
        "partial = functools.partial(add, more=2.0)\n\n"
        "class Adder:\n    def __call__(self, completions, **kwargs):\n"
        "        return [3.0 for _ in completions]\n\nobject = Adder()\n"
    )
    digests = []
    for name, value in (("partial", 2.0), ("object", 3.0)):
        scorer = build_fresh_scorer(FunctionSettings(kind="function", function=f"{file}:{name}"))
        digests.append(scorer.identity()["source_sha256"])
        scorer.start()
        assert scorer.score([scoring_input(["a", "b"])])[0].tolist() == [[value, value]]
    assert digests[0] == digests[1] is not None
    built_in = build_fresh_scorer(FunctionSettings(kind="function", function="math:sqrt"))
    assert built_in.identity()["source_sha256"] is None
    assert isinstance(load_function(f"{file}:partial"), functools.partial)


def test_columns_may_have_any_name(file: Path) -> None:
    """Also those of the arguments of the scorer's own functions."""
    file.write_text(
        "def score(completions, group, index, self, arguments, **kwargs):\n"
        "    return [float(a + b + c + d) for a, b, c, d in zip(group, index, self, arguments)]\n"
    )
    scorer = build_fresh_scorer(FunctionSettings(kind="function", function=f"{file}:score"))
    scorer.start()
    given = scoring_input(["a", "b"], group=1, index=2, self=3, arguments=4)
    assert scorer.score([given])[0].tolist() == [[10.0, 10.0]]


def test_an_exception_without_a_traceback_has_no_place() -> None:
    assert place_of(ValueError("x")) == ""


# ---- judges ----


def test_an_answer_without_a_judgement_names_its_group_and_the_pattern(tmp_path: Path) -> None:
    root = answered_dataset(tmp_path / "data", 4)
    served = JudgeServer()
    try:
        served.fault = lambda question, times: "prose" if "It is 4\n" in question else None
        with pytest.raises(DataError, match="no judgement in the answer") as error:
            reward(root, {"a": judge(served, max_attempts=1)})
    finally:
        served.close()
    first, example = error.value.lines()
    assert "match pattern Score:" in first
    # Group 0 has 2 responses, 0 and 1; group 1 has "It is 1" to "It is 3"; the sizes are 2 to 5.
    assert example.startswith("group 'group-0000")
    assert ", response " in example


def test_a_template_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rubric.jinja"
    path.write_text("One\n{{ response }}\n{{ nothing }}\n")
    settings = {"kind": "judge", "model": "m", "base_url": "http://localhost/v1"}
    scorer = build_fresh_scorer(JudgeSettings(**settings, template=str(path)))
    with pytest.raises(DataError, match=rf"{path}, line 3: UndefinedError"):
        scorer.score([scoring_input(["a"])])
    with pytest.raises(ConfigError, match="line 2: TemplateSyntaxError"):
        build_fresh_scorer(JudgeSettings(**settings, template="One\n{{ response \n"))
