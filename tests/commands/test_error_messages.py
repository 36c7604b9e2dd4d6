"""How an error is written: one sentence for the rule and the value, one for the remedy."""

from __future__ import annotations

import pytest

from gvpo_offline.errors import ConfigError


@pytest.mark.parametrize(
    ("remedy", "sentence"),
    [
        ("correct the path", "Correct the path."),
        ("raise it.", "Raise it."),
        ("did you mean beta?", "Did you mean beta?"),
        # Names of settings and commands are written as they are typed.
        ("ref_model: run `gvpo-offline reference`", "ref_model: run `gvpo-offline reference`."),
        ("tokenizer: it is called processing_class", "tokenizer: it is called processing_class."),
        ("pip install liger-kernel", "pip install liger-kernel."),
        ("step_size is too large", "step_size is too large."),
    ],
)
def test_a_remedy_is_a_sentence_that_keeps_names(remedy: str, sentence: str) -> None:
    error = ConfigError("the rule holds", received="x", remedy=remedy)
    assert str(error) == f"the rule holds; received x. {sentence}"


def test_a_value_that_ends_with_a_full_stop_gets_no_second_one() -> None:
    error = ConfigError("the hub answers", received="Timeout: try later.", remedy="wait")
    assert str(error) == "the hub answers; received Timeout: try later. Wait."
