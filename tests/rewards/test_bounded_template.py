"""Templates of judges that would fill the memory: an error that names the group."""

from __future__ import annotations

import pytest

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.judge import bounded_template
from gvpo_offline.rewards.judge.rubric import Rubric
from gvpo_offline.rewards.kinds import JudgeSettings

GROUP = ScoringInput("g", "2 + 2?", None, ("4",), {}, location={"group": "g"})


def text_of(template: str) -> str:
    settings = JudgeSettings(kind="judge", base_url="http://a/v1", model="m", template=template)
    return str(Rubric(settings).messages(GROUP, 0, None)[-1]["content"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 9999999 ** 999 }}",
        "{% set t = 'a' * 10 ** 6 %}{{ t * 10 ** 6 }}",
    ],
)
def test_an_operator_has_a_limit(template: str) -> None:
    with pytest.raises(DataError, match=r"SecurityError: (a text has|an exponent is) at most"):
        text_of(template)


def test_a_text_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 times 10 characters."""
    template = "{% for i in range(1000) %}{{ response * 10 }}{% endfor %}"
    assert text_of(template) == "4" * 10_000
    monkeypatch.setattr(bounded_template, "MOST_CHARACTERS", 9_999)
    with pytest.raises(DataError, match="a template writes at most 9,999 characters"):
        text_of(template)


def test_deep_templates_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="valid Jinja"):
        text_of("{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}")


def test_templates_are_rendered_as_before() -> None:
    assert (
        text_of("{{ prompt }} {{ '=' * 3 }} {{ 2 ** 3 * 2 }} {{ scale[1] }}") == "2 + 2? === 16 10"
    )
