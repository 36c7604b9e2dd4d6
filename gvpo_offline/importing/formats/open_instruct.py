"""open-instruct: what its GRPO trainer writes with `save_traces`, `<run>_rollouts_<n>.jsonl`.

Token ids are read as they are. Responses to one prompt at one step are a group, sampled by
`run@step`. (`prompt_idx` only counts within a step, and no longer tells prompts apart where cut
responses were filtered out or a run began again; the prompt's token ids do.) What the run's
`<run>_metadata.jsonl`, in the same folder, says about the model goes into the manifest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    group_id,
    one_response,
    run_name,
)
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.values import token_ids

_FILE = re.compile(r"(.+)_rollouts_\d+\.jsonl(\.gz)?")
_DESCRIBED = ("model_name", "git_commit", "timestamp")


def open_format(config: ImportConfig) -> OpenInstructFormat:
    """The format; the reward is `reward`."""
    return OpenInstructFormat(config)


class OpenInstructFormat(TrainerFormat):
    """Rows of open-instruct's rollout records."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(
            config,
            required=("step", "prompt_tokens", "response_tokens", "reward", "finish_reason"),
        )

    def run_of(self, source: InputInfo) -> str:
        """The run's name, from the file's."""
        found = _FILE.fullmatch(Path(source.label).name)
        return run_name(source) if found is None else found[1]

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """The run, and what its metadata file says about it."""
        run = self.run_of(source)
        path = Path(source.label).with_name(f"{run}_metadata.jsonl")
        if not path.is_file():
            return {"run": run}
        try:
            (line,) = path.read_text(encoding="utf-8").splitlines()
            described = json.loads(line)
            return {"run": run, **{name: str(described[name]) for name in _DESCRIBED}}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"open-instruct's metadata file is one JSON object with {', '.join(_DESCRIBED)}",
                received=str(error),
                remedy="restore the file, or move it away to import without it",
                file=path,
            ) from error

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        if (record.get("request_info") or {}).get("tool_calleds"):
            self.record_failure(place, "it called tools, whose output the log does not tell apart")
            return []
        fragment = one_response(
            prompt_ids=token_ids(record["prompt_tokens"], "prompt_tokens"),
            ids=token_ids(record["response_tokens"], "response_tokens"),
            reward=values.number(record["reward"], "reward"),
            truncated=values.truncated(record["finish_reason"]),
            sampler=f"{place.run}@{record['step']}",
        )
        fragment.group_id = group_id(fragment, place.run, record["step"])
        return [fragment]
