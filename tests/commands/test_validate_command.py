"""`gvpo-offline validate` as a gate: exit status, formats; the verdict in `ls` and on cards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from support.builders import build_dataset
from support.planted import END, PLANTED, clean, clean_groups, write

import gvpo_offline
from gvpo_offline import cli
from gvpo_offline.contract import contract
from gvpo_offline.errors import ConfigError, IntegrityError
from gvpo_offline.hub.card import BEGIN, card
from gvpo_offline.hub.push import card_findings
from gvpo_offline.info.dataset import dataset_info
from gvpo_offline.info.text import info_lines
from gvpo_offline.store.manifest import Manifest, load_manifest
from gvpo_offline.store.writer import publish
from gvpo_offline.tokenizer import load_tokenizer, tokenizer_info

SCHEMA = json.loads(contract()["findings.schema.json"])


def run(*argv: str | Path) -> int:
    return cli.main(["validate", *map(str, argv), "--show_progress", "false"])


# ---- exit status ----


def test_thresholds_are_read_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From an open pipe, as `--thresholds <(…)` gives one, they cannot be read again."""
    root = clean(tmp_path / "data")
    reading, writing = os.pipe()
    os.write(writing, b"min_groups: 121\n")
    os.close(writing)
    assert run(root, "--thresholds", Path(f"/dev/fd/{reading}")) == 0
    os.close(reading)
    assert "120 groups; min_groups is 121" in capfd.readouterr().out


@pytest.mark.parametrize(("command", "unbuffered"), [("validate", ""), ("ls", "1")])
def test_output_that_nobody_reads_is_dropped(tmp_path: Path, command: str, unbuffered: str) -> None:
    """As after `| head -1`: no traceback, and not the status of a check that passed."""
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run(
        [sys.executable, "-m", "gvpo_offline.cli", command, str(clean(tmp_path))],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        check=False,
    )
    os.close(writing)
    assert (found.returncode, b"Error" in found.stderr) == (141, False), found.stderr


def test_a_clean_dataset_gives_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(clean(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}: valid. 6 files, 120 groups, 480 responses, ")
    assert lines[-2] == "verdict pass: nothing found"
    assert lines[-1].startswith("next: gvpo-offline train --dataset ")


def test_the_status_follows_the_severity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error gives 1; a warning and a note give 0 unless fail_on or a threshold says more."""
    fatal = PLANTED["all-rewards-equal"](tmp_path / "fatal")
    doubtful = PLANTED["nearly-all-wrong"](tmp_path / "doubtful")
    assert run(fatal) == 1
    assert run(fatal, "--fail_on", "never") == 0
    assert run(doubtful) == 0
    assert run(doubtful, "--fail_on", "warning") == 1
    gate = tmp_path / "gate.yaml"
    gate.write_text("max_equal_reward_share: off\n")
    assert run(doubtful, "--fail_on", "warning", "--thresholds", gate) == 0
    assert run(doubtful, "--fail_on", "note", "--thresholds", gate) == 1
    gate.write_text("max_equal_reward_share: {max: 0.7, severity: error}\n")
    assert run(doubtful, "--thresholds", gate, "--light") == 1
    out = capsys.readouterr().out
    assert "errors\n  equal-rewards: 90 of 120 groups have equal rewards (75.0%)" in out
    assert "light checks only. 6 files" in out


def test_settings_that_are_wrong_give_1_and_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = clean(tmp_path / "d")
    assert run(folder, "--thresholds", tmp_path / "no.yaml") == 1
    assert run(folder, "--format", "yaml") == 1
    assert run(folder, "--fail_on", "fatal") == 1
    for name in ("json", "sarif", "junit"):
        assert run(tmp_path / "nowhere", "--format", name) == 1
    assert run(folder, "--light", "true", "--output", folder) == 1  # a folder is there
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no.yaml" in captured.err
    assert "what is written is a file, new or to be replaced; received a folder" in captured.err
    assert captured.err.count("a dataset is a folder that holds a manifest") == 3


# ---- formats ----


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("a-flipped-byte", "integrity"),
        ("a-sidecar-of-another-version", "integrity"),
        ("a-mask-that-counts-nothing", "invalid-data"),
    ],
)
def test_an_error_of_the_data_is_a_finding_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, rule: str
) -> None:
    """As text it is an error message, as before."""
    folder = PLANTED[name](tmp_path / "d")
    assert run(folder) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("gvpo-offline validate: error: ")
    assert captured.out == ""
    for form in ("json", "sarif", "junit"):
        assert run(folder, "--format", form, "--output", tmp_path / form) == 1
        assert "fail: 1 error; written to" in capsys.readouterr().out
    found = json.loads((tmp_path / "json").read_text())
    jsonschema.validate(found, SCHEMA)
    (finding,) = found["findings"]
    assert (finding["rule"], finding["severity"]) == (rule, "error")
    assert (finding["count"], finding["of"]) == (1, 6 if rule == "integrity" else 120)
    assert finding["examples"][0]["file"].startswith(str(folder))
    assert (found["dataset_version"], found["counts"]) == (1, {})
    (result,) = json.loads((tmp_path / "sarif").read_text())["runs"][0]["results"]
    assert (result["ruleId"], result["level"]) == (rule, "error")
    suite = ElementTree.parse(tmp_path / "junit").getroot()[0]
    assert (suite.attrib["errors"], suite.attrib["failures"]) == ("1", "0")


def test_a_damaged_manifest_is_a_finding_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = clean(tmp_path)
    path = folder / "manifest-000001.json"
    path.write_text(path.read_text().replace("made-up", "made-UP", 1))
    assert run(folder, "--format", "json") == 1
    found = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, SCHEMA)
    assert [each["rule"] for each in found["findings"]] == ["integrity"]
    assert found["dataset_version"] is None


def test_documents_go_to_standard_output_or_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same document in both; the folder of the file is made, and no other file stays."""
    folder = PLANTED["responses-that-were-cut"](tmp_path / "d")
    path = tmp_path / "out" / "findings.json"
    assert run(folder, "--format", "json") == 0
    printed = capsys.readouterr().out
    assert run(folder, "--format", "json", "--output", path) == 0
    assert path.read_text() == printed
    assert list(path.parent.iterdir()) == [path]
    out = capsys.readouterr().out
    assert out == f"{folder}: warn: 1 warning; written to {path}\n"
    found = json.loads(printed)
    jsonschema.validate(found, SCHEMA)
    assert found["counts"]["groups"] == 120
    assert found["thresholds"]["max_truncated"] == 0.1
    assert run(folder, "--output", path) == 0
    assert "truncated-responses: 120 of 480 responses were truncated (25.0%)" in path.read_text()


def test_texts_of_a_log_control_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = clean_groups()
    object.__setattr__(groups[0], "group_id", "\x1b[31m\u202egroup")
    folder = write(tmp_path / "d", groups)
    (tmp_path / "gate.yaml").write_text("max_truncated: 0")
    for form in ("text", "json", "sarif", "junit"):
        assert run(folder, "--thresholds", tmp_path / "gate.yaml", "--format", form) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "\u202e" not in out
        assert "u202egroup" in out


# ---- the end tokens of the tokenizer ----


def test_the_tokenizer_says_which_tokens_end_a_response(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """Responses end with id 2 as the data say. The tokenizer in the folder that the dataset records
    has another end token, so by it none of the 468 responses that were not cut ends."""
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<eos>")}
    groups = clean_groups()
    if END in ends:  # then another id takes its place in the data
        for group in groups:
            for ids in group.response_token_ids:
                ids[ids == END] = 7
    known = write(tmp_path / "known", groups, tokenizer=tokenizer_info(tokenizer))
    config = gvpo_offline.ValidateConfig(dataset=str(known), show_progress=False)
    (finding,) = [
        each for each in gvpo_offline.validate(config).findings if each.rule == "missing-end-token"
    ]
    assert (finding.count, finding.of) == (468, 468)
    assert f"(id {min(ends)}" in finding.text
    gone = tokenizer_info(tokenizer).model_copy(update={"name_or_path": str(tmp_path / "gone")})
    unknown = write(tmp_path / "unknown", groups, tokenizer=gone)
    config = gvpo_offline.ValidateConfig(dataset=str(unknown), show_progress=False)
    rules = {each.rule for each in gvpo_offline.validate(config).findings}
    assert "missing-end-token" not in rules
    config.tokenizer_name_or_path = str(tiny_tokenizer_dir)
    rules = {each.rule for each in gvpo_offline.validate(config).findings}
    assert "missing-end-token" in rules
    config.tokenizer_name_or_path = str(tmp_path / "gone")
    with pytest.raises(ConfigError, match="the tokenizer is a folder"):
        gvpo_offline.validate(config)


def test_another_tokenizer_is_refused_in_every_format(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """It is a wrong setting and no fault of the data."""
    folder = clean(tmp_path / "d")
    config = gvpo_offline.ValidateConfig(
        dataset=str(folder), tokenizer_name_or_path=str(tiny_tokenizer_dir), show_progress=False
    )
    with pytest.raises(IntegrityError, match="uses the tokenizer and chat template"):
        gvpo_offline.validate(config)
    argv = [folder, "--tokenizer_name_or_path", tiny_tokenizer_dir, "--format", "json"]
    assert run(*argv, "--output", tmp_path / "f.json") == 1
    assert not (tmp_path / "f.json").exists()


# ---- public Python, ls and cards ----


def test_validate_returns_findings(tmp_path: Path) -> None:
    folder = PLANTED["copied-responses"](tmp_path)
    found = gvpo_offline.validate(
        gvpo_offline.ValidateConfig(dataset=str(folder), show_progress=False)
    )
    assert found.survey.n_groups == 120
    assert found.n_files == 6
    assert found.manifest == load_manifest(folder)
    assert found.verdict == "warn"
    assert [each.rule for each in found.findings] == ["duplicate-responses"]


def test_ls_shows_the_verdict_of_the_light_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = PLANTED["nearly-all-wrong"](tmp_path / "d")
    info = dataset_info(folder, content=True)
    assert info.findings is not None
    assert [each.rule for each in info.findings] == ["equal-rewards", "all-wrong-groups"]
    found = info.as_dict()["checks"]
    assert found["verdict"] == "warn"
    assert found["findings"][0]["count"] == 90
    lines = info_lines(info)
    at = next(number for number, line in enumerate(lines) if line.strip().startswith("verdict"))
    assert lines[at].split() == ["verdict", "warn:", "1", "warning,", "1", "note"]
    assert lines[at + 1].split()[:3] == ["warning", "equal-rewards", "90"]
    assert cli.main(["ls", str(folder), "--content", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"] == json.loads(json.dumps(found))
    plain = dataset_info(folder)
    assert plain.findings is None
    assert "checks" not in plain.as_dict()
    (line,) = (line for line in info_lines(plain) if line.strip().startswith("verdict"))
    assert line.split()[:3] == ["verdict", "not", "checked;"]


def test_ls_surveys_rewards_of_older_versions_too(tmp_path: Path) -> None:
    """The light checks survey the newest version alone."""

    def build(newest: Manifest | None) -> Manifest:
        assert newest is not None
        first = newest.rewards[0]
        return newest.model_copy(
            update={"rewards": [first, first.model_copy(update={"version": 2})]}
        )

    publish(clean(tmp_path), build)
    info = dataset_info(tmp_path, content=True)
    assert list(info.surveys) == ["reward@1", "reward@2"]
    # Same files: the same mean of 0, 0.25, 0.5 and 1, less what truncated responses lost.
    assert info.surveys["reward@1"].reward_mean == info.surveys["reward@2"].reward_mean


def test_a_card_has_the_verdict_and_the_findings(tmp_path: Path) -> None:
    folder = PLANTED["two-samplers-under-one-name"](tmp_path / "d")
    manifest = load_manifest(folder)
    text = card(manifest, "me/data", findings=card_findings(folder, manifest))
    checks = text.partition("## Checks")[2].partition("\n#")[0]
    assert "at their default thresholds: warn: 1 warning." in checks
    assert "| warning | `sampler-settings` | 1 of 3 samplers have several settings" in checks
    assert "## Checks" not in card(manifest, "me/data")
    good = clean(tmp_path / "clean")
    manifest = load_manifest(good)
    text = card(manifest, "me/data", text, card_findings(good, manifest))
    assert text.count(BEGIN) == text.count("## Checks") == 1
    assert "default thresholds: pass: nothing found." in text
    bad = PLANTED["a-reward-that-is-nan"](tmp_path / "nan")
    manifest = load_manifest(bad)
    text = card(manifest, "me/data", findings=card_findings(bad, manifest))
    assert "| error | `invalid-data` | a reward is a finite number; received nan" in text
    assert str(tmp_path) not in text


def test_a_dataset_of_the_builders_passes_without_errors(tmp_path: Path) -> None:
    """24 groups of random ids: too few, without end tokens or a tokenizer, but no error."""
    build_dataset(tmp_path, 24)
    found = gvpo_offline.validate(
        gvpo_offline.ValidateConfig(dataset=str(tmp_path), show_progress=False)
    )
    assert found.verdict == "warn"
    assert {"few-groups", "unknown-tokenizer"} <= {each.rule for each in found.findings}
    assert np.isfinite(found.survey.reward_mean)
