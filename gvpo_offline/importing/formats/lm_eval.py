"""lm-evaluation-harness: `samples_<task>_<date>.jsonl`, which `--log_samples` writes.

A row holds a document of a task: the request that was sent, the responses to it (one, or as many as
the task repeats it) and, by name, the metrics that one of the task's filters gives. The harness
writes all rows once for each filter, so the same responses come several times in a file. Responses
to the same prompt, of all files, are a group.

A metric is one number for all responses of a document. It is the reward where there is one
response; where there are several, no single response has a reward.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.named_scores import NamedScores
from gvpo_offline.importing.formats.shared.row_format import text_fragment
from gvpo_offline.importing.formats.shared.trainer_logs import RowLocation, TrainerFormat
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record, Row
from gvpo_offline.json_text import loads, parsed_messages

# Fields of a row that are no metrics, for logs before `metrics` listed them.
_FIELDS = (
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"),
    *("doc_hash", "prompt_hash", "target_hash", "task_name", "schema_version", "num_fewshot"),
)
_DATE = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.")


def open_format(config: ImportConfig) -> LMEvalFormat:
    """The format; the keys of `reward_weights` are metrics, `exact_match`, or metrics of a filter
    as the harness's results name them, `exact_match,strict-match`."""
    return LMEvalFormat(config)


class LMEvalFormat(TrainerFormat):
    """Reads the rows of samples files."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=("doc_id", "arguments", "resps"), has_parts=True)
        self._scores = NamedScores(config, "metric")
        filters = {name.partition(",")[2] for name in config.reward_weights}
        if len(filters) > 1:
            raise ConfigError(
                "the metrics that reward_weights names are of one filter",
                received=", ".join(config.reward_weights),
                remedy="name metrics of one filter, all as metric,filter or all as metric",
            )
        self._wanted = next(iter(filters), "")
        self._first: tuple[str | None, list[str]] = (None, [])
        self._matched = False
        self._repeated = 0

    def run_of(self, source: InputInfo) -> str:
        """The model that wrote the responses, or empty text; see `_model`."""
        return _model(source.label) or ""

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """The model, which the results file or the folder names."""
        model = self.run_of(source)
        return {"model": model} if model else {}

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """The fragments of each row; see `LogFormat.read`."""
        self._first, self._matched = (None, []), False
        yield from super().read(rows, source)
        if self._first[1] and not self._matched:
            raise DataError(
                "a samples file has the filter that reward_weights names",
                received=f"{self._wanted}; the file has {', '.join(self._first[1])}",
                remedy="import files with other filters apart",
                file=source.label,
            )

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        name, metrics = _filter(record), _metrics(record)
        responses = _responses(record["resps"])
        if not self._first[1]:
            self._first = (name, [_full(metric, name) for metric in metrics] or ["none"])
        if self._wanted and name != self._wanted:
            self._repeated += len(responses)
            return []
        self._matched = True
        if not self._wanted and name != self._first[0]:
            if len(responses) > 1 and not self.config.reward_weights:
                self._repeated += len(responses)
                return []
            ours = [_full(metric, name) for metric in metrics]
            raise DataError(
                "the rows of a samples file have the metrics of one filter, or reward_weights says "
                "which filter counts",
                received=f"{', '.join(self._first[1])}; {', '.join(ours)}",
                remedy=f"set reward_weights to one of them, such as "
                f"--reward_weights '{{\"{(ours or self._first[1])[0]}\": 1}}'",
            )
        fragment = text_fragment(
            _prompt(record["arguments"]), responses, samplers=[place.run or None] * len(responses)
        )
        self._set_rewards(fragment, record, metrics, name)
        return [fragment]

    def _set_rewards(
        self, fragment: Fragment, record: Record, metrics: Sequence[str], name: str | None
    ) -> None:
        found = {_full(m, name) if self._wanted else m: record[m] for m in metrics if m in record}
        if fragment.size == 1 and found:
            self._scores.set(fragment, found)
        elif self.config.reward_weights:
            raise DataError(
                "a metric is the reward of a response where a document has one response",
                received=f"{fragment.size} responses with one value of {', '.join(found) or 'no'} "
                "metrics",
                remedy="leave reward_weights out: the import then has no rewards, and "
                "`gvpo-offline reward` computes one for each response",
            )

    def finish(self) -> Mapping[str, int]:
        """See `DropsResponses.finish`."""
        found = super().finish()
        self._scores.check()
        return {**found, "dropped_filter_responses": self._repeated}


def _full(metric: str, name: str | None) -> str:
    return metric if name is None else f"{metric},{name}"


def _filter(record: Record) -> str | None:
    name = record.get("filter")
    if name is not None and not isinstance(name, str):
        raise DataError("the name of a filter is text", received=repr(name))
    return name


def _metrics(record: Record) -> list[str]:
    listed = record.get("metrics")
    if listed is None:
        return [name for name in record if name not in _FIELDS]
    return [str(name) for name in values.entries(listed, "metrics")]


def _responses(given: Any) -> list[str]:
    """The responses to a document's request.

    Raises:
        DataError: the document has several requests, or what the model returned is no text.
    """
    requests = values.entries(given, "resps")
    if len(requests) == 1:
        found = [requests[0]] if isinstance(requests[0], str) else requests[0]
        found = values.entries(found, "the responses to a request")
        if found and all(isinstance(text, str) for text in found):
            return found
    raise DataError(
        "the model wrote a text: a document of a generate_until task has one request, and texts "
        "as responses",
        received=f"{len(requests)} requests, {str(given)[:120]}",
        remedy="leave the samples of multiple_choice and loglikelihood tasks out: they hold "
        "log-likelihoods of given texts",
    )


def _prompt(arguments: Any) -> conversations.Prompt:
    """The text, or the chat messages, that were sent to the model.

    Raises:
        DataError: they have another form, or a picture was sent too.
    """
    if isinstance(arguments, dict):
        first = values.struct(arguments.get("gen_args_0"), "gen_args_0")
        sent = [first[name] for name in sorted(first)]
    else:
        requests = values.entries(arguments, "arguments")
        sent = values.entries(requests[0], "the arguments of a request") if requests else []
    if not sent:
        raise DataError("arguments.gen_args_0.arg_0 is the prompt", received=str(arguments)[:120])
    for further in sent[2:]:
        if isinstance(further, dict) and any(further.values()):
            raise DataError(
                "a request is text",
                received=f"a request with {', '.join(k for k, v in further.items() if v)}",
                remedy="remove the row: the policy is a language model and reads text alone",
            )
    text = sent[0]
    # Chat models: a tuple of one text, the JSON of the messages.
    chat = isinstance(text, list) and len(text) == 1 and isinstance(text[0], str)
    if chat or (isinstance(text, dict) and set(text) == {"prompt"}):
        text = text[0] if isinstance(text, list) else text["prompt"]
        return conversations.prompt(parsed_messages(text))
    if not isinstance(text, str):
        raise DataError("arguments.gen_args_0.arg_0 is the prompt", received=str(text)[:120])
    return conversations.prompt(text)


def _model(label: str) -> str | None:
    """The model of a samples file.

    The results file of the same date beside it names it; else the folder, as the harness names it
    (`org__model`).
    """
    path = Path(label)
    date = _DATE.search(path.name)
    if date is not None:
        try:
            results = loads((path.parent / f"results_{date.group(1)}.json").read_text("utf-8"))
        except (OSError, ValueError):
            results = None
        model = results.get("model_name") if isinstance(results, dict) else None
        if isinstance(model, str) and model:
            return model
    folder = path.absolute().parent.name
    return folder.replace("__", "/", 1) if "__" in folder.strip("_") else None
