"""OpenRLHF: what `openrlhf.cli.batch_inference` wrote (up to version 0.9), JSON lines of `input`,
`output` and, once scored (`--eval_task rm`), `reward`.

Responses to one `input` are a group, wherever they stand: with `--best_of_n` the file holds all
prompts once, then all of them again. A post-processor (`--post_processor`) leaves one response or a
pair of each group; such files are of another format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gvpo_offline.collect import values
from gvpo_offline.collect.formats import InputInfo, Record
from gvpo_offline.collect.fragment import Fragment
from gvpo_offline.collect.trainer_logs import Place, TrainerFormat, one_response
from gvpo_offline.config import ImportConfig


def open_format(config: ImportConfig) -> OpenRLHFFormat:
    """The format; the reward is `reward`, which may be missing."""
    return OpenRLHFFormat(config)


class OpenRLHFFormat(TrainerFormat):
    """Rows of OpenRLHF's batch inference."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=("input", "output"))

    def beside(self, source: InputInfo) -> Mapping[str, str]:
        """Nothing: the file is all there is."""
        return {}

    def parse(self, record: Record, place: Place) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        fragment = one_response(
            prompt=values.prompt(record["input"]),
            text=values.response(record["output"]),
            reward=values.number(record.get("reward")),
        )
        if "reward" not in record:
            fragment.rewards = None
        return [fragment]
