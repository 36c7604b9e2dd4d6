"""`gvpo-offline`: one subcommand per stage, with settings from YAML files and flags.

Only the parser of the chosen command is built. torch is imported when the command runs, so that
`--help` is fast.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any

from gvpo_offline.commands.command import Command
from gvpo_offline.commands.console import (
    LogHandler,
    OutputClosed,
    VisibleFormatter,
    complain,
    drop_output,
    flush_output,
)
from gvpo_offline.commands.interrupted import interrupted_line
from gvpo_offline.commands.next_step import ARGUMENTS
from gvpo_offline.commands.suggestions import check_flags, explained
from gvpo_offline.commands.table import COMMANDS
from gvpo_offline.errors import ConfigError, GVPOError
from gvpo_offline.exit_status import FAILED, INTERRUPTED, OUTPUT_CLOSED
from gvpo_offline.files import check_file
from gvpo_offline.interrupts import two_interrupts, was_interrupted
from gvpo_offline.json_text import is_storable
from gvpo_offline.sampled_eval.settings import SampledEvalSettings
from gvpo_offline.settings import load_yaml
from gvpo_offline.system_errors import untranslated_lines
from gvpo_offline.train.foreign import closest
from gvpo_offline.train.settings import CommonTrainingSettings, GVPOSettings, RunSettings
from gvpo_offline.version import __version__
from gvpo_offline.visible import visible

_HELP_FLAGS = {"-h", "--help"}
_KEY = re.compile(r'Parser key "([^"]+)"')
_VALUE = re.compile(r"(?:Got value|Given value)(?! type)[^:]*: (.*)")
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_EXPECTED = re.compile(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])(?:\.|$)", re.M)
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping of names to values",
}


def _parser(name: str, command: Command, settings: Sequence[type], skip: set[str]) -> Any:
    import jsonargparse
    from yaml import YAMLError

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader("yaml", load_yaml, exceptions=(YAMLError,))
    parser = jsonargparse.ArgumentParser(
        prog=f"gvpo-offline {name}",
        description=command.summary,
        epilog=command.epilog,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of settings; flags and files after it override it.",
    )
    taken: set[str] = set()
    for kind in settings:
        parser.add_class_arguments(kind, None, skip=(skip | taken) & _names(kind))
        taken |= _names(kind)
    return parser


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def _plain(namespace: Any) -> dict[str, Any]:
    values: dict[str, Any] = namespace.as_dict()
    values.pop("config", None)
    return values


def _overview() -> str:
    lines = [
        "usage: gvpo-offline COMMAND [--config FILE.yaml] [--setting value ...]",
        "",
        "Trains language models with GVPO on logged groups of scored responses.",
        "",
        *(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()),
        "",
        "gvpo-offline COMMAND --help describes a command's settings.",
    ]
    return "\n".join(lines)


def _parse(name: str, command: Command, argv: Sequence[str]) -> dict[str, Any]:
    settings, skip = command.settings, {"resume_from_checkpoint"} - _names(RunSettings)
    if GVPOSettings in settings and not _HELP_FLAGS & set(argv):
        from gvpo_offline.train.config import GVPOConfig

        # GVPOConfig comes last because the first class defines a flag: RunSettings must define
        # resume_from_checkpoint, which also takes true and auto.
        held = (GVPOSettings, SampledEvalSettings, CommonTrainingSettings)
        others = [own for own in settings if own not in held]
        settings = (*others, GVPOConfig)
    argv = _with_underscores(settings, argv)
    parser = _parser(name, command, settings, skip)
    options = list(parser._option_string_actions)
    check_flags(name, argv, options, COMMANDS)
    _check_config_files(argv)
    try:
        return _plain(parser.parse_args(_flags(command.positional, settings, argv)))
    except UnicodeDecodeError as error:
        raise ConfigError(
            "a file of settings is YAML in UTF-8",
            received=str(error),
            remedy="save the file given with --config in UTF-8",
        ) from error
    except GVPOError:
        raise
    except ValueError as error:  # a null character in what jsonargparse tries as a path
        raise ConfigError(
            "flags and YAML keys are settings of the command, with values of the right type",
            received=str(error),
            remedy=f"correct the value. See gvpo-offline {name} --help",
        ) from error
    except ArgumentError as error:
        unknown = explained(name, str(error), options, COMMANDS)
        if unknown is not None:
            raise unknown from error
        raise ConfigError(
            "flags and YAML keys are settings of the command, with values of the right type",
            received=_complaint(str(error)),
            remedy=f"{_expected(str(error))}See gvpo-offline {name} --help",
        ) from error


def _check_texts(settings: dict[str, Any]) -> None:
    """Raise ConfigError for a setting, above all a path, with bytes that are not UTF-8: Arrow opens
    no such file, and no manifest can name it.
    """
    for name, value in settings.items():
        if not is_storable(value):
            raise ConfigError(
                "settings are text in UTF-8, the names of files and folders as well",
                received=f"{name}: {visible(str(value))}",
                remedy="rename the file or folder, or correct the setting",
            )


def _check_config_files(argv: Sequence[str]) -> None:
    """Raise ConfigError if a `--config` is a folder, or a pipe or device that may have no end."""
    given = [b for a, b in itertools.pairwise(argv) if a == "--config"]
    given += [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    for path in given:
        try:
            if os.path.lexists(path):
                check_file(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "a file of settings is a YAML file",
                received=getattr(error, "strerror", None) or str(error),
                remedy="correct the path given with --config",
                file=path,
            ) from error


def _with_underscores(settings: Sequence[type], argv: Sequence[str]) -> list[str]:
    """Arguments with flags that are written with dashes (`--prompt-tokens`) as settings are."""
    names = {name for kind in settings for name in _names(kind)}
    found = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        known = flag.startswith("--") and name.partition(".")[0] in names
        found.append(f"--{name}{equals}{value}" if known else argument)
    return found


def _flags(positional: str, settings: Sequence[type], argv: Sequence[str]) -> list[str]:
    """Arguments for the parser.

    Arguments before the first flag become the value of the setting `positional`. A boolean flag
    without a value gets the value true.
    """
    first = list(itertools.takewhile(lambda argument: not argument.startswith("-"), argv))
    if positional and first:
        kinds = {own.name: str(own.type) for kind in settings for own in fields(kind)}
        if "list" in kinds[positional]:
            argv = [f"--{positional}", json.dumps(first), *argv[len(first) :]]
        else:
            argv = [f"--{positional}", *argv]
    switches = {f"--{field.name}" for kind in settings for field in fields(kind) if _is_bool(field)}
    found = []
    for argument, following in itertools.pairwise([*argv, "--"]):
        alone = argument in switches and following.startswith("--")
        found += [argument, "true"] if alone else [argument]
    return found


def _is_bool(field: Field[Any]) -> bool:
    return field.type in (bool, "bool")


def _complaint(text: str) -> str:
    """An error message of jsonargparse, shortened to the setting and the value if it has both."""
    key, value = _KEY.search(text), _VALUE.search(text)
    if key and "NestedArg" in text:
        return f"a setting within {key.group(1)}, which is a single value"
    if key and value:
        return f"{key.group(1)}: {value.group(1)}"
    if missing := _REQUIRED.search(text):
        return f"no {missing.group(1).strip()}"
    return " ".join(text.split())


def _expected(text: str) -> str:
    """What a setting takes, by an error message of jsonargparse, as a sentence; "" if unknown."""
    key, kinds = _KEY.search(text), _EXPECTED.findall(text)
    kinds = [(kind, values) for kind, values in kinds if kind != "NoneType"]
    takes = [f"one of {values}" if values else _KINDS.get(kind, "") for kind, values in kinds]
    if key is None or not takes or not all(takes):
        return ""
    return f"set {key.group(1)} to {' or '.join(takes)}. "


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 1 after a `GVPOError` or an error of the system, and where a command
        says so (`validate` with findings of severity error); 2 if there is no such command; 130
        after Ctrl-C; 141 if standard output is a pipe that nobody reads any more, as after
        `| head`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in _HELP_FLAGS:
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        similar = closest(name, COMMANDS)
        hint = f": did you mean {similar[0]}?" if similar else ""
        print(f"{_overview()}\n\nerror: no command {name!r}{hint}", file=sys.stderr)
        return 2
    handler = LogHandler()
    handler.setFormatter(VisibleFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("gvpo_offline").setLevel(logging.INFO)
    token = ARGUMENTS.set(tuple(arguments[1:]))
    settings: dict[str, Any] = {}
    try:
        with two_interrupts():
            return _run(name, arguments[1:], settings)
    except OutputClosed:
        drop_output()
        return OUTPUT_CLOSED
    finally:
        ARGUMENTS.reset(token)


def _run(name: str, argv: Sequence[str], settings: dict[str, Any]) -> int:
    """Run a command; fills `settings` with its settings. Returns the exit status."""
    try:
        settings.update(_parse(name, COMMANDS[name], argv))
        _check_texts(settings)
        status = COMMANDS[name].run(dict(settings)) or 0
        flush_output()
        return status
    except OutputClosed:
        raise
    except (Exception, KeyboardInterrupt) as error:
        # A library may turn the interrupt into an error of its own.
        if isinstance(error, KeyboardInterrupt) or was_interrupted():
            if (line := interrupted_line(name, settings)) is not None:
                complain(visible(line))
            return INTERRUPTED
        if isinstance(error, GVPOError):
            lines = error.lines()
        elif isinstance(error, OSError):
            lines = untranslated_lines(error)
        else:
            raise
        complain(f"gvpo-offline {name}: error: " + "\n  ".join(lines))
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
