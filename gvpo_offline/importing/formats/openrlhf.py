"""OpenRLHF: what `openrlhf.cli.batch_inference` wrote until it was removed in 2026, JSON lines of
`input`, `output` and, once scored (`--eval_task rm`), `reward`.

Responses to one `input` are a group, wherever they stand: with `--best_of_n` the file holds all
prompts once, then all of them again. A post-processor (`--post_processor`) leaves one response or a
pair of each group; such files are of another format.
"""

from __future__ import annotations

from collections.abc import Sequence

from gvpo_offline import values
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record


def open_format(config: ImportConfig) -> RowFormat:
    """The format; the reward is `reward`, which may be missing."""
    return RowFormat(config, required=("input", "output"), optional=("reward",), parse=_parse)


def _parse(record: Record) -> Sequence[Fragment]:
    reward = [values.number(record["reward"])] if "reward" in record else None
    return [text_fragment(values.prompt(record["input"]), [record["output"]], reward)]
