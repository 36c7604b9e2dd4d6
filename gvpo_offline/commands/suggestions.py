"""What a wrong flag or YAML key was probably meant to be.

Answers are looked for in this order: the same words with hyphens, a name of TRL or verl for a
setting of the command, a name of TRL or verl for something else, a setting of the command that is
written similarly, and a setting of another command.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass

from gvpo_offline.commands.command import Command
from gvpo_offline.errors import ConfigError
from gvpo_offline.train.foreign import (
    CONFIG_NAMES,
    EQUIVALENTS,
    SAMPLER_NAMES,
    TRAINER_NAMES,
    VERL_PATHS,
    closest,
)

_RULE = "flags and YAML keys are settings of the command"
# Messages of jsonargparse about a key of a YAML file.
_KEY = re.compile(r"Option '([^']+)' is not accepted")
_NESTED_KEY = re.compile(r"Group '([^']+)' does not accept option '([^']+)'")
_CLASS = re.compile(r"given class_path '([\w.]+)'")
_EXTRA = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)


def check_flags(
    name: str, argv: Sequence[str], options: Collection[str], commands: Mapping[str, Command]
) -> None:
    """Raise ConfigError, with a suggestion, if a flag is not one of the command.

    Args:
        name: of the command.
        argv: its arguments.
        options: its flags, with their dashes.
        commands: all commands, by name.
    """
    for argument in argv:
        if argument == "--":
            return
        flag = argument.partition("=")[0]
        if argument.startswith("--") and not _is_accepted(flag, options):
            raise _error(name, flag, flag[2:], _names(options), commands, "--")


def explained(
    name: str, message: str, options: Collection[str], commands: Mapping[str, Command]
) -> ConfigError | None:
    """The error for a message of the parser about an unknown key or argument; None: another.

    Args:
        name: of the command.
        message: the parser's.
        options: the flags of the command, with their dashes.
        commands: all commands, by name.
    """
    known = _names(options)
    if found := _NESTED_KEY.search(message):
        key = ".".join(found.groups())
        return _error(name, f"the key {key}", key, known, commands)
    if found := _KEY.search(message):
        inside = _CLASS.search(message)
        within = _fields_of(inside.group(1)) if inside else known
        key = found.group(1)
        return _error(name, f"the key {key}", key, within, commands)
    if found := _EXTRA.search(message):
        first = found.group(1).split()[0]
        if "=" in first and not first.startswith("-"):
            return _error(name, first, first.partition("=")[0], known, commands, "--")
        if not first.startswith("-"):
            return ConfigError(
                _RULE,
                received=f"unrecognized arguments: {found.group(1)}",
                remedy="each value follows the name of its setting; a list is one value, '[a, b]', "
                f"and a pattern is written in quotes, '*.jsonl'. See gvpo-offline {name} --help",
            )
    return None


def suggestion(
    name: str, wrong: str, known: Collection[str], commands: Mapping[str, Command], dashes: str = ""
) -> str:
    """What to do about a wrong setting, as a sentence without its full stop; "" if unknown.

    Args:
        name: of the command.
        wrong: the setting, without dashes.
        known: the settings of the command.
        commands: all commands, by name.
        dashes: what is written before a setting: "--" for flags.
    """
    written = wrong.replace("-", "_")
    short = VERL_PATHS.get(written, written.rpartition(".")[2])
    same = [each for each in EQUIVALENTS.get(short, ()) if each in known]
    similar = closest(written, known)
    if written in known:
        return f"did you mean {dashes}{written}?"
    if name == "sample" and short in SAMPLER_NAMES:
        return f"it is a setting of a sampler: samplers.NAME.{SAMPLER_NAMES[short]}"
    if short in known:
        return f"did you mean {dashes}{short}?"
    if same:
        return f"here it is {' and '.join(dashes + each for each in same)}"
    if similar and short not in CONFIG_NAMES:
        return f"did you mean {dashes}{similar[0]}?"
    if short in CONFIG_NAMES or short in TRAINER_NAMES:
        return CONFIG_NAMES.get(short, TRAINER_NAMES.get(short, ""))
    others = [
        other
        for other, command in commands.items()
        if other != name and any(short == own for kind in command.settings for own in _own(kind))
    ]
    if others:
        return f"it is a setting of gvpo-offline {', '.join(others)}"
    parts = {part: each for each in sorted(known) for part in each.split("_")}
    near = closest(short, parts)
    return f"did you mean {dashes}{parts[near[0]]}?" if near else ""


def _error(
    command: str,
    received: str,
    wrong: str,
    known: Collection[str],
    commands: Mapping[str, Command],
    dashes: str = "",
) -> ConfigError:
    answer = suggestion(command, wrong, known, commands, dashes)
    end = "" if not answer else " " if answer.endswith("?") else ". "
    help_text = f"See gvpo-offline {command} --help"
    return ConfigError(_RULE, received=received, remedy=f"{answer}{end}{help_text}")


def _is_accepted(flag: str, options: Collection[str]) -> bool:
    """Whether the parser knows the flag, an abbreviation of it, or a key of a dictionary."""
    if flag in options or sum(option.startswith(flag) for option in options) == 1:
        return True
    parent = flag.rpartition(".")[0]
    while parent:
        if parent in options or f"{parent}+" in options:
            # Settings of a group have flags of their own; keys of a dictionary do not.
            return not any(option.startswith(f"{parent}.") for option in options)
        parent = parent.rpartition(".")[0]
    return False


def _names(options: Iterable[str]) -> set[str]:
    return {option[2:].rstrip("+") for option in options if option.startswith("--")} - {"help"}


def _own(kind: type) -> set[str]:
    return {field.name for field in fields(kind)} if is_dataclass(kind) else set()


def _fields_of(path: str) -> set[str]:
    """The fields of a dataclass, by its import path; none if it cannot be found."""
    module, _, name = path.rpartition(".")
    try:
        return _own(getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, ValueError):
        return set()
