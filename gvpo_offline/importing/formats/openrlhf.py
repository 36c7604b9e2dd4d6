"""OpenRLHF: output of `openrlhf.cli.batch_inference` (removed from OpenRLHF in 2026): JSON lines of
`input`, `output` and, after scoring (`--eval_task rm`), `reward`.

Responses to one `input` are a group, in any order of rows: with `--best_of_n` the file repeats the
whole list of prompts n times. A post-processor (`--post_processor`) keeps one response or one pair
of each group and writes another format, which this module does not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from gvpo_offline import conversations
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.formats.shared.scores import RewardReader
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record


def open_format(config: ImportConfig) -> RowFormat:
    """One response per row; the reward is `reward`, a column that may be missing."""
    return RowFormat(
        config,
        required=("input", "output"),
        optional=("reward",),
        parse=partial(_parse, read=RewardReader(config)),
        reads_labels=True,
    )


def _parse(record: Record, *, read: RewardReader) -> Sequence[Fragment]:
    reward = [read(record["reward"])] if "reward" in record else None
    return [text_fragment(conversations.prompt(record["input"]), [record["output"]], reward)]
