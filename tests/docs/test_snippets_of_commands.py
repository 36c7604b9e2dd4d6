"""Commands and YAML files that the documentation shows are accepted by the command line as it is.

A renamed flag, YAML key, `make` target, script or extra fails here. Nothing is run: every
`gvpo-offline` line goes through the parser of the command, with its types and choices.
"""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.snippets import (
    PAGES,
    ROOT,
    ShellLine,
    Snippet,
    all_snippets,
    shell_lines,
    snippets,
)

from gvpo_offline import cli
from gvpo_offline.commands.table import COMMANDS
from gvpo_offline.errors import ConfigError
from gvpo_offline.train.config import GVPOConfig

SHELL = ("", "sh", "bash", "shell", "console")
PROGRAM = ("gvpo-offline", ".venv/bin/gvpo-offline")
LAUNCHERS = ("accelerate", "torchrun")
# What other commands of the pages are, and what is checked of them: see `check_other`.
TOOLS = ("cat", "cd", "cut", "git", "grep", "head", "tail")
KNOWN_PROGRAMS = ("make", "python", "pip", "vllm", *TOOLS, *LAUNCHERS, *PROGRAM)
# The command whose settings the YAML blocks of a page are, in their order.
YAML_OF = {
    "docs/howto/mixing.md": ["train"],
    "docs/howto/remote.md": ["train"],
    "docs/howto/rewards.md": ["reward", "reward", "reward", "reward"],
    "docs/howto/sampled-evaluation.md": ["reward", "train"],
    "docs/howto/sampling.md": ["sample", "sample"],
    "docs/howto/tuning.md": ["tune"],
    "docs/reference/limits.md": ["import"],
    "docs/start/from-verl.md": ["reward"],
}
MISSING = re.compile(r"no [\w, ]+")  # what an error has received where a setting is required
FILES_OF_SETTINGS = {
    path: re.split(r"[_.]", path.name)[0]
    for path in sorted((ROOT / "pipelines").rglob("*.yaml"))
    if re.split(r"[_.]", path.name)[0] in COMMANDS
}


def is_shell(snippet: Snippet) -> bool:
    """Whether a block is commands: an indented one is, if its first word is a known program."""
    if snippet.language not in SHELL:
        return False
    lines = snippet.text.strip().splitlines()
    first = lines[0].removeprefix("$ ").split() if lines else []
    return bool(snippet.language) or bool(first and first[0] in KNOWN_PROGRAMS)


COMMAND_BLOCKS = [s for page in PAGES for s in snippets(page) if is_shell(s) and not s.not_run]
YAML_BLOCKS = [s for s in all_snippets("yaml") if not s.not_run]


def values_of(argv: Sequence[str], folder: Path, *, shortened: bool = False) -> dict[str, Any]:
    """The settings that the command line makes of the words behind `gvpo-offline`.

    A settings file of the reader's own is replaced by an empty one. Where it, or a `…`, may hold
    further settings, a required setting may be missing; the result is then empty.
    """
    command, *words = argv
    if "--help" in argv and set(argv) <= {"--help", *COMMANDS}:
        return {}
    assert command in COMMANDS, command
    partial = shortened
    for place, (flag, value) in enumerate(itertools.pairwise(words)):
        if flag == "--config" and not (ROOT / value).is_file():
            empty = folder / "empty.yaml"
            empty.write_text("{}\n", encoding="utf-8")
            words[place + 1] = str(empty)
            partial = True
        elif flag == "--config":
            words[place + 1] = str(ROOT / value)
            partial = True
    try:
        return cli._parse(command, COMMANDS[command], words)
    except ConfigError as error:
        if partial and MISSING.fullmatch(str(error.received)):
            return {}
        raise


def after_program(line: ShellLine) -> list[str] | None:
    """The words behind `gvpo-offline`, or behind a launcher's `-m gvpo_offline.cli`."""
    words = list(line.words)
    if words[0] in PROGRAM:
        return words[1:]
    if "gvpo_offline.cli" in words:
        return words[words.index("gvpo_offline.cli") + 1 :]
    return None


def check_other(words: Sequence[str]) -> None:
    """Targets of make, scripts with their flags, extras, and files of launchers exist."""
    program, *rest = words
    assert program in KNOWN_PROGRAMS, f"{program}: unknown to this test"
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        named = [word for word in rest if "=" not in word]
        assert set(named) <= set(targets)
    if program == "python" and rest[0].endswith(".py"):
        script = ROOT / rest[0]
        assert script.is_file()
        sources = "".join(p.read_text("utf-8") for p in script.parent.glob("*.py"))
        flags = [word.strip("[]") for word in rest[1:] if word.strip("[]").startswith("--")]
        assert [flag for flag in flags if f'"{flag}"' not in sources] == []
    if program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        extras = re.findall(r"gvpo[-_]offline\[([\w,]+)\]", " ".join(rest))
        named = [name for names in extras for name in names.split(",")]
        assert set(named) <= set(project["optional-dependencies"])
    if program in LAUNCHERS:
        files = [word for word in words if word.startswith("pipelines/")]
        assert [file for file in files if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("snippet", COMMAND_BLOCKS, ids=lambda snippet: snippet.name)
def test_the_commands_of_the_documentation_are_accepted(snippet: Snippet, tmp_path: Path) -> None:
    for part in commands_of(snippet.text):
        argv = after_program(part)
        if part.words[0] not in PROGRAM:
            check_other(part.words)
        if argv is not None and argv:
            values_of(argv, tmp_path, shortened=part.shortened)


def commands_of(text: str) -> Iterator[ShellLine]:
    """The commands of a block; `a && b` and `a | b` are two. Where output goes is left out."""
    for line in shell_lines(text):
        words: list[str] = []
        for before, word in itertools.pairwise(("", *line.words, "|")):
            if word in ("&&", "|"):
                yield ShellLine(tuple(words), line.shortened)
                words = []
            elif ">" not in (before, word) and word != "2>&1":
                words.append(word)


@pytest.mark.parametrize("page", sorted({snippet.page for snippet in YAML_BLOCKS}))
def test_the_yaml_blocks_of_the_documentation_are_settings(page: str, tmp_path: Path) -> None:
    """With the kinds of scorers and samplers inside them."""
    blocks = [snippet for snippet in YAML_BLOCKS if snippet.page == page]
    assert len(YAML_OF.get(page, [])) == len(blocks), f"add {page} to YAML_OF"
    for snippet, command in zip(blocks, YAML_OF[page], strict=True):
        file = tmp_path / "settings.yaml"
        file.write_text(snippet.text, encoding="utf-8")
        check_file(command, file)


@pytest.mark.parametrize("path", FILES_OF_SETTINGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_files_of_the_pipelines_are_settings(path: Path) -> None:
    check_file(FILES_OF_SETTINGS[path], path)


def check_file(command: str, file: Path) -> None:
    """A YAML file is settings of a command; those that are required may be missing."""
    try:
        values = cli._parse(command, COMMANDS[command], ["--config", str(file)])
    except ConfigError as error:
        if not MISSING.fullmatch(str(error.received)):
            raise
        return
    if command == "reward":
        from gvpo_offline.rewards.settings import RewardConfig

        RewardConfig(dataset="data", scorers=values["scorers"]).settings()
    if command == "sample":
        from gvpo_offline.sampling.settings import sampler_settings

        assert values["samplers"]
        for name, sampler in values["samplers"].items():
            sampler_settings(name, sampler)


# ---- the checks can fail ----


@pytest.mark.parametrize(
    "line",
    [
        "gvpo-offline train --dataset data --learning_rte 1e-3 …",
        "gvpo-offline train --dataset data --groups_per_step many …",
        "gvpo-offline train --loss_type nonsense …",
        "gvpo-offline train --dataset data",  # nothing stands for the model
        "accelerate launch -m gvpo_offline.cli train --beat 0.1 …",
    ],
)
def test_a_wrong_command_is_found(line: str, tmp_path: Path) -> None:
    (command,) = commands_of(line)
    argv = after_program(command)
    assert argv is not None
    with pytest.raises(ConfigError):
        values_of(argv, tmp_path, shortened=command.shortened)


@pytest.mark.parametrize(
    "line",
    ["make nonsense", "python examples/none.py", "python examples/loop.py --none 1",
     "pip install 'gvpo-offline[none]'", "nonsense --flag"],
)  # fmt: skip
def test_a_wrong_target_script_or_extra_is_found(line: str) -> None:
    with pytest.raises(AssertionError):
        check_other(shlex.split(line))


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("train", "learning_rte: 1.0e-3\n"),
        ("train", "datasets: [{path: data, weigth: 3}]\n"),
        ("reward", "dataset: data\nscorers: {a: {kind: math, colum: answer}}\n"),
        ("sample", "samplers: {a: {kind: transformers, model: c}}\n"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_found(command: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    needed = "inputs: a\noutput_dir: b\ntokenizer_name_or_path: c\n" if command == "sample" else ""
    file.write_text(needed + text, encoding="utf-8")
    with pytest.raises(ConfigError):
        check_file(command, file)


def test_blocks_are_found_where_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fenced, indented, and inside a list; a comment before a block says why it is not run."""
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n    make docs\n\n- item\n\n  ```python\n  x = 1\n  ```\n\n"
        "<!-- not run: needs a GPU -->\n\n```yaml\na: 1\n```\n\n<!-- not run: elsewhere -->\n\n"
        "text\n\n```yaml\nb: 2\n```\n",
        encoding="utf-8",
    )
    monkeypatch.setattr("support.snippets.ROOT", tmp_path)
    assert [(s.line, s.language, s.text, s.not_run) for s in snippets(page)] == [
        (3, "", "make docs\n", None),
        (8, "python", "x = 1\n", None),
        (14, "yaml", "a: 1\n", "needs a GPU"),
        (22, "yaml", "b: 2\n", None),  # the comment belongs to the paragraph
    ]
    (line,) = shell_lines("gvpo-offline train \\\n  --beta $(python -c 'f(1)') …  # why\n")
    assert line == ShellLine(("gvpo-offline", "train", "--beta", "SUBSTITUTED"), True)


# ---- flags in the text ----

# Flags of other programs that pages name: torchrun, lm-evaluation-harness, promptfoo, vLLM, sbatch.
FOREIGN_FLAGS = {"nproc_per_node", "log_samples", "output", "generation_config", "array"}
FOREIGN_FLAGS |= {"max_lora_rank", "signal"}  # of vLLM, of Slurm
SHOWN_AS_WRONG = {"learning_rte", "lr", "model"}  # in start/from-trl.md


def flags_in_text() -> dict[str, set[str]]:
    """Each `--flag` in inline code, with the pages that name it."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            for flag in re.findall(r"(?:^|\s)--([\w-]+)", code):
                found.setdefault(flag.replace("-", "_"), set()).add(
                    page.relative_to(ROOT).as_posix()
                )
    return found


def test_the_flags_in_the_text_exist() -> None:
    """Each is a setting of a command, or a flag of a program of this repository."""
    known = {field.name for c in COMMANDS.values() for kind in c.settings for field in fields(kind)}
    known |= {field.name for field in fields(GVPOConfig)} | {"config", "help", "version"}
    folders = ("pipelines", "benchmarks", "research", "examples")
    scripts = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in scripts:
        found = re.findall(r'"--([\w-]+)"', path.read_text(encoding="utf-8"))
        known |= {flag.replace("-", "_") for flag in found}
    known |= FOREIGN_FLAGS | SHOWN_AS_WRONG
    wrong = {flag: pages for flag, pages in flags_in_text().items() if flag not in known}
    assert wrong == {}
