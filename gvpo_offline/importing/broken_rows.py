"""Rows and groups that break a rule: what `on_error` does with them, and the report of an import.

With `on_error: stop` the first pass collects broken rows, and one error names every rule that they
break. With `on_error: drop` they are left out and listed in `import_report.jsonl`, one JSON object
per broken row or group: `file` and `row` (zero-based), `group` where it is known, `samplers` (the
number of dropped responses by sampler; empty where the sampler is not known), `dropped` (`row` or
`group`), `rule`, `received` and `remedy`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gvpo_offline import conversations, values
from gvpo_offline.cells import cell_value
from gvpo_offline.errors import DataError
from gvpo_offline.files import fsync_folder, storage_errors, temporary_name
from gvpo_offline.importing.as_chat import ChatPrompts
from gvpo_offline.importing.fragment import GROUP_ID_DIGITS, Fragment, prompt_key
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.messages import is_message
from gvpo_offline.paths import MISSING, value_at
from gvpo_offline.store.writer import IMPORT_REPORT

Record = Mapping[str, Any]

# With `on_error: stop`, reading ends after this many broken rows.
STOP_AFTER = 1000
_RULES_NAMED = 20
_SAMPLERS_NAMED = 10
_RECEIVED_CHARACTERS = 500
_ARGUMENTS = ("tools", "chat_template_kwargs")
_DROPPING = (
    "To import without such rows, set on_error: drop, which leaves each out with all of its "
    f"responses and lists it in {IMPORT_REPORT}."
)


class BrokenRows:
    """Collects the rows and groups that break a rule.

    Args:
        config: the import's settings, of which `on_error` and `max_errors` are used.
        earlier: number of broken rows and groups that count towards `max_errors` already.

    Attributes:
        total: number of broken rows and groups, without `earlier`.
        records: the lines of the report, with `on_error: drop`.
        raised: the error that `add` raised because there were too many, or None.
    """

    def __init__(self, config: ImportConfig, earlier: int = 0) -> None:
        self._config = config
        self._earlier = earlier
        self._faults: dict[str, tuple[DataError, int]] = {}
        self.total = 0
        self.records: list[dict[str, Any]] = []
        self.raised: DataError | None = None

    @property
    def drops(self) -> bool:
        """Whether broken rows and groups are dropped."""
        return self._config.on_error == "drop"

    def add(
        self,
        error: DataError,
        *,
        group: str | None = None,
        samplers: Mapping[str, int] | None = None,
        dropped: Literal["row", "group"] = "row",
    ) -> None:
        """Add a broken row or group.

        Args:
            error: the rule that is broken; names file and row.
            group: id of the group, if `error` does not name it and it is known.
            samplers: number of dropped responses by sampler, as far as it is known.
            dropped: what is dropped, with `on_error: drop`.

        Raises:
            DataError: there are too many broken rows; names every rule.
        """
        if self.raised is not None:
            raise self.raised
        first, n = self._faults.get(error.rule, (error, 0))
        self._faults[error.rule] = (first, n + 1)
        if self.drops:
            self.extend([_record(error, group, samplers or {}, dropped)])
            return
        self.total += 1
        if self.total >= STOP_AFTER:
            self.raised = self.error()
            assert self.raised is not None
            raise self.raised

    @property
    def faults(self) -> list[tuple[DataError, int]]:
        """For each rule that is broken, its first error and the number of errors, in order."""
        return list(self._faults.values())

    def merge(self, faults: Iterable[tuple[DataError, int]]) -> None:
        """Add what another collection found in later rows, with `on_error: stop`.

        Args:
            faults: its `faults`.
        """
        for error, n in faults:
            first, before = self._faults.get(error.rule, (error, 0))
            self._faults[error.rule] = (first, before + n)
            self.total += n

    def extend(self, records: Iterable[dict[str, Any]]) -> None:
        """Add lines of the report of another collection, with `on_error: drop`.

        Raises:
            DataError: there are too many broken rows; names every rule.
        """
        for record in records:
            self.total += 1
            self.records.append(record)
            if self._earlier + self.total > self._config.max_errors:
                self.raised = too_many(self._config, self.records, self._earlier)
                raise self.raised

    def error(self) -> DataError | None:
        """One error for all broken rows, which names every rule; None if there are none.

        It is the error of the first broken row. Further lines of its message say how many more rows
        break the same rule, and give the first row and the number of rows for each other rule.
        """
        if not self._faults:
            return None
        (first, n), *others = self._faults.values()
        more = [_more(n - 1)] if n > 1 else []
        more += [f"Also {_in_line(each, count)}" for each, count in others[: _RULES_NAMED - 1]]
        if len(others) >= _RULES_NAMED:
            rest = others[_RULES_NAMED - 1 :]
            more.append(
                f"Also {_rows(sum(c for _, c in rest))} that break {len(rest)} other rules."
            )
        if self.total >= STOP_AFTER:
            more.append(f"Reading ended after {self.total:,} broken rows.")
        if self.total > 1:
            more.append(_DROPPING)
        return first.replaced(more=more)


def too_many(config: ImportConfig, records: Sequence[Record], earlier: int = 0) -> DataError:
    """The error of an import that found more than `max_errors` broken rows and groups."""
    first = records[0]
    before = f", after {earlier:,} of the first pass" if earlier else ""
    return DataError(
        f"at most {config.max_errors:,} rows and groups break a rule (max_errors)",
        received=f"{earlier + len(records):,} or more",
        remedy="correct the log or the settings, or raise max_errors",
        file=first["file"],
        row=first["row"],
        group=first["group"],
        more=[f"Broken rows and groups by rule{before}:", *summary_lines(summary(records))],
    )


def _rows(n: int) -> str:
    return f"{n:,} row" if n == 1 else f"{n:,} rows"


def _more(n: int) -> str:
    return f"{n:,} more {'row breaks' if n == 1 else 'rows break'} this rule."


def _in_line(error: DataError, n: int) -> str:
    lines = " ".join(str(error).splitlines())
    return lines if n == 1 else f"{lines} {_more(n - 1)}"


def _record(
    error: DataError, group: str | None, samplers: Mapping[str, int], dropped: str
) -> dict[str, Any]:
    received = error.received
    text = received if isinstance(received, str) or received is None else repr(received)
    if text is not None and len(text) > _RECEIVED_CHARACTERS:
        text = text[:_RECEIVED_CHARACTERS] + "…"
    return {
        "file": error.file,
        "row": error.row,
        "group": error.group or group,
        "samplers": dict(sorted(samplers.items())),
        "dropped": dropped,
        "rule": error.rule,
        "received": text,
        "remedy": error.remedy,
    }


def row_names(
    record: Record | None, config: ImportConfig, default: str, chat: ChatPrompts
) -> tuple[str | None, dict[str, int]]:
    """The group, and the number of responses by sampler, of a row that is not a valid fragment.

    Args:
        record: the row, or None if it could not be parsed.
        config: the import's settings. Only `format: flat` names the columns of both.
        default: the sampler of responses for which the log names none.
        chat: makes chat messages of prompts given as text, as for valid rows.

    Returns:
        The group's id or None, and the number of responses of the row's samplers, or nothing: as
        far as both are known.
    """
    names = config.columns
    if config.format != "flat":
        return None, {} if config.sampler is None else {config.sampler: 1}
    if record is None:
        return None, {default: 1} if names.sampler is None else {}

    def value(name: str | None) -> Any:
        found = None if name is None else value_at(record, name)
        return None if found is MISSING else found

    n = _group_size(value(names.response), value(names.response_token_ids))
    named: Any = value(names.sampler)
    if names.sampler is None or (cell_value(named) is None and config.sampler is not None):
        named = default
    if n is None or not isinstance(named, list):
        named = [named] * (1 if n is None else n)
    known = all(isinstance(name, str) and name for name in named)
    samplers = dict(Counter(named)) if known else {}
    try:
        if names.group_id is not None:
            return values.identifier(value(names.group_id)), samplers
        arguments = {name: value(getattr(names, name)) for name in _ARGUMENTS}
        text, messages = conversations.prompt(value(names.prompt))
        ids = value(names.prompt_token_ids)
        if ids is not None:
            ids = values.token_ids(cell_value(ids), "a prompt")
        elif text or messages:
            text, messages = chat.prompt(text, messages, default, 0, warn=False)
        else:
            return None, samplers
        fragment = Fragment(text, messages, ids, [], None, None, [], [])
        fragment.template_arguments = conversations.template_arguments(arguments)
        return prompt_key(fragment)[:GROUP_ID_DIGITS], samplers
    except DataError:
        return None, samplers


def _group_size(responses: Any, ids: Any) -> int | None:
    """The number of responses of a row that holds a group; None: it holds one response."""
    if isinstance(responses, list):
        return None if responses and all(map(is_message, responses)) else len(responses)
    many = responses is None and isinstance(ids, list) and any(isinstance(i, list) for i in ids)
    return len(ids) if many else None


def summary(records: Iterable[Record]) -> dict[str, Any]:
    """Counts of a report, for the lineage: of broken rows and groups in all, by rule and by
    sampler (in responses), and of those whose sampler or group is not known."""
    found: Counter[str] = Counter()
    rules: Counter[str] = Counter()
    samplers: Counter[str] = Counter()
    for record in records:
        found[f"{record['dropped']}s"] += 1
        rules[record["rule"]] += 1
        samplers.update(record["samplers"])
        found["without_sampler"] += not record["samplers"]
        found["without_group"] += record["group"] is None
    return {
        **{name: found[name] for name in ("rows", "groups", "without_sampler", "without_group")},
        "rules": dict(sorted(rules.items(), key=lambda item: (-item[1], item[0]))),
        "samplers": dict(sorted(samplers.items(), key=lambda item: (-item[1], item[0]))),
    }


def summary_lines(counts: Mapping[str, Any]) -> list[str]:
    """The lines that say how many rows broke which rule, and whose responses they held."""
    rules = list(counts["rules"].items())
    lines = [f"{n:,}: {rule}" for rule, n in rules[:_RULES_NAMED]]
    if len(rules) > _RULES_NAMED:
        others = rules[_RULES_NAMED:]
        lines.append(f"{sum(n for _, n in others):,}: {len(others)} other rules")
    samplers = list(counts["samplers"].items())
    if samplers:
        named = ", ".join(f"{name} {n:,}" for name, n in samplers[:_SAMPLERS_NAMED])
        rest = len(samplers) - _SAMPLERS_NAMED
        lines.append(
            f"responses in them by sampler: {named}" + (f", {rest} more samplers" * (rest > 0))
        )
    for key, what in (("sampler", "sampler"), ("group", "group")):
        if n := counts[f"without_{key}"]:
            lines.append(f"of {_rows(n)} the {what} is not known")
    return lines


def write_report(root: Path, records: Sequence[Record]) -> None:
    """Write `import_report.jsonl` into a dataset's folder; without records, remove it.

    Raises:
        StorageError: the disk is full.
    """
    path = root / IMPORT_REPORT
    if not records:
        path.unlink(missing_ok=True)
        return
    temporary = temporary_name(root, IMPORT_REPORT)
    try:
        with storage_errors(path):
            with temporary.open("w", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(root)
    finally:
        temporary.unlink(missing_ok=True)
