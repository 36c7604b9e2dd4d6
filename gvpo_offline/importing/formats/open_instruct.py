"""open-instruct: `<run>_rollouts_<n>.jsonl`, which its GRPO trainer writes with `save_traces`.

Token ids are imported unchanged. Responses to one prompt at one step are a group, and their sampler
is `run@step`. Prompts are identified by their token ids, not by `prompt_idx`: that counts within a
step and is ambiguous where truncated responses were filtered out or a run was restarted. The model
description in `<run>_metadata.jsonl`, in the same folder, is copied into the manifest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.finish_reasons import ending
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    group_id,
    one_response,
    run_name,
    step_name,
)
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.json_text import loads
from gvpo_offline.values import token_ids

_FILE = re.compile(r"(.+)_rollouts_\d+\.jsonl(\.gz)?")
_DESCRIBED = ("model_name", "git_commit", "timestamp")


def open_format(config: ImportConfig) -> OpenInstructFormat:
    """The format; the reward is `reward`."""
    return OpenInstructFormat(config)


class OpenInstructFormat(TrainerFormat):
    """Reads the rows of open-instruct's rollout records."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(
            config,
            required=("step", "prompt_tokens", "response_tokens", "reward", "finish_reason"),
        )

    def run_of(self, source: InputInfo) -> str:
        """The name of the run, taken from the file name."""
        found = _FILE.fullmatch(Path(source.label).name)
        return run_name(source) if found is None else found[1]

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """The name of the run and the fields of its metadata file.

        Raises:
            DataError: the metadata file exists but cannot be parsed.
        """
        run = self.run_of(source)
        path = Path(source.label).with_name(f"{run}_metadata.jsonl")
        if not path.is_file():
            return {"run": run}
        try:
            (line,) = path.read_text(encoding="utf-8").splitlines()
            described = loads(line)
            return {"run": run, **{name: str(described[name]) for name in _DESCRIBED}}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"open-instruct's metadata file is one JSON object with {', '.join(_DESCRIBED)}",
                received=str(error),
                remedy="restore the file, or remove it to import without it",
                file=path,
            ) from error

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        if values.struct(record.get("request_info"), "request_info").get("tool_calleds"):
            self.record_failure(
                place, "it called tools, and the log does not mark the tokens of their output"
            )
            return []
        reason, step = record["finish_reason"], step_name(record["step"])
        ended = ending(reason)
        if ended == "failed":
            self.record_failure(place, f"the finish reason {reason!r}")
            return []
        fragment = one_response(
            prompt_ids=token_ids(record["prompt_tokens"], "prompt_tokens"),
            ids=token_ids(record["response_tokens"], "response_tokens"),
            reward=self.reward(record["reward"], "reward"),
            truncated=ended == "cut",
            sampler=f"{place.run}@{step}",
        )
        fragment.group_id = group_id(fragment, place.run, step)
        return [fragment]
