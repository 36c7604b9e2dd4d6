"""The first pass of an import: reads every row once, checks it by itself, and spills its fragments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.encode import Encoder, TokenizerRequirements
from gvpo_offline.importing.formats.shared.log_format import DropsResponses, LogFormat
from gvpo_offline.importing.fragment import (
    GROUP_ID_DIGITS,
    Fragment,
    check_fragment,
    prompt_key,
    with_location,
)
from gvpo_offline.importing.regroup import FragmentSpill
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.files import Source

Advance = Callable[[int], Any]


class FirstPass:
    """Reads the rows of all inputs, and collects what the second pass and the manifest need.

    Args:
        config: the import's settings.
        log_format: turns the rows into fragments.
        sources: the inputs.
        encoder: the tokenizer, or None.

    Attributes:
        rows: number of fragments of each input.
        left_out: numbers of responses that the format dropped, by reason.
        samplers: names of all samplers.
        components: names of all components of the reward.
        rewarded: location of the first row with rewards, or None.
        unrewarded: location of the first row without rewards, or None.
    """

    def __init__(
        self,
        config: ImportConfig,
        log_format: LogFormat,
        sources: Sequence[Source],
        encoder: Encoder | None,
    ) -> None:
        self._config = config
        self._format = log_format
        self._sources = sources
        self._vocab_size = None if encoder is None else encoder.vocab_size
        self._needs = TokenizerRequirements(encoder)
        self.rows = [0] * len(sources)
        self.left_out: Mapping[str, int] = {}
        self.samplers: set[str] = set()
        self.components: set[str] = set()
        self.rewarded: str | None = None
        self.unrewarded: str | None = None

    def read(self, spill: FragmentSpill, advance: Advance) -> None:
        """Add the fragments of all rows to `spill`.

        Args:
            spill: an open spill; flushed at the end.
            advance: called with the number of bytes read.

        Raises:
            DataError: a row breaks a rule, or an input changed; names file and row.
            ConfigError: a row needs a tokenizer, a chat template or an end token.
            IntegrityError: an input is damaged.
            StorageError: the disk is full.
        """
        for number, source in enumerate(self._sources):
            self._read_source(number, source, spill, advance)
            source.check_unchanged()
        spill.flush()
        if isinstance(self._format, DropsResponses):
            self.left_out = self._format.finish()

    def _read_source(
        self, number: int, source: Source, spill: FragmentSpill, advance: Advance
    ) -> None:
        default = self._config.sampler or source.name
        for fragment in self._format.read(source.rows(self._format.columns, advance), source):
            fragment.file = number
            try:
                check_fragment(fragment, self._config, vocab_size=self._vocab_size)
            except DataError as error:
                location = {"file": source.label, "row": fragment.row}
                raise with_location(error, group=fragment.group_id, **location) from None  # type: ignore[arg-type]
            self._needs.check(fragment, source.label)
            key = prompt_key(fragment)
            if fragment.group_id is None:
                fragment.group_id = key[:GROUP_ID_DIGITS]
            self._note(fragment, source, default)
            spill.add(fragment, key)

    def _note(self, fragment: Fragment, source: Source, default: str) -> None:
        self.rows[fragment.file] += 1
        self.samplers.update(name or default for name in fragment.samplers)
        self.components.update(fragment.components or ())
        if fragment.rewards is None:
            self.unrewarded = self.unrewarded or f"{source.label}, row {fragment.row}"
        else:
            self.rewarded = self.rewarded or f"{source.label}, row {fragment.row}"

    def check(self) -> None:
        """Check the rules that all rows together must follow.

        Raises:
            DataError: there is no row, or only some rows have a reward.
            ConfigError: `samplers` names a sampler that no row has.
        """
        if not sum(self.rows):
            raise DataError(
                "an import yields at least 1 group",
                received="inputs without a row",
                remedy="check the inputs",
                file=self._sources[0].label,
            )
        if self.rewarded and self.unrewarded:
            raise DataError(
                "every row has a reward, or none has",
                received=f"rewards at {self.rewarded} and none at {self.unrewarded}",
                remedy="score the other rows, or import the two logs as two datasets",
            )
        unknown = sorted(set(self._config.samplers) - self.samplers)
        if unknown:
            raise ConfigError(
                "samplers has settings only of samplers that are in the log",
                received=f"{', '.join(unknown)}; the log has {', '.join(sorted(self.samplers))}",
                remedy="correct the names, or set `sampler` or columns.sampler",
            )
