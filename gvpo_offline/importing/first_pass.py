"""The first pass of an import: reads every row once, checks it, and spills its fragments.

With `on_error: stop` it reads on after a broken row, so that one error names every rule that rows
break; with `on_error: drop` it leaves broken rows out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gvpo_offline.chat.encoder import Encoder
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.as_chat import ChatPrompts
from gvpo_offline.importing.broken_rows import BrokenRows, row_names, summary, summary_lines
from gvpo_offline.importing.encode import TokenizerRequirements
from gvpo_offline.importing.formats.shared.log_format import DropsResponses, LogFormat
from gvpo_offline.importing.fragment import (
    GROUP_ID_DIGITS,
    Fragment,
    check_fragment,
    prompt_key,
    with_location,
    with_more,
)
from gvpo_offline.importing.regroup import FragmentSpill
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.files import Source
from gvpo_offline.importing.sources.media import MEDIA, text_rows

Advance = Callable[[int], Any]


class FirstPass:
    """Reads the rows of all inputs, and collects what the second pass and the manifest need.

    Args:
        config: the import's settings.
        log_format: turns the rows into fragments.
        sources: the inputs.
        encoder: the tokenizer, or None.
        chat: makes chat messages of prompts given as text, as the settings say.

    Attributes:
        rows: number of fragments of each input.
        left_out: numbers of responses that the format dropped, by reason.
        samplers: names of all samplers.
        components: names of all components of the reward.
        rewarded: location of the first row with rewards, or None.
        unrewarded: location of the first row without rewards, or None.
        broken: the rows that break a rule.
        reduced: ids of the groups of dropped rows, as far as they are known.
    """

    def __init__(
        self,
        config: ImportConfig,
        log_format: LogFormat,
        sources: Sequence[Source],
        encoder: Encoder | None,
        chat: ChatPrompts,
    ) -> None:
        self._config = config
        self._format = log_format
        self._sources = sources
        self._chat = chat
        self._vocab_size = None if encoder is None else encoder.vocab_size
        self._ends = () if encoder is None else encoder.end_texts
        self._needs = TokenizerRequirements(encoder)
        self.rows = [0] * len(sources)
        self.left_out: Counter[str] = Counter()
        self.samplers: set[str] = set()
        self.components: set[str] = set()
        self.rewarded: str | None = None
        self.unrewarded: str | None = None
        self.broken = BrokenRows(config)
        self.reduced: set[str] = set()

    def read(
        self, spill: FragmentSpill, advance: Advance, only: Collection[int] | None = None
    ) -> None:
        """Add the fragments of all rows to `spill`.

        Args:
            spill: an open spill; flushed at the end.
            advance: called with the number of bytes read.
            only: numbers of the inputs to read; None: all.

        With `on_error: stop`, broken rows are collected for `check`.

        Raises:
            DataError: there are too many broken rows, or an input changed; names file and row.
            ConfigError: a row needs a tokenizer, a chat template or an end token.
            IntegrityError: an input is damaged.
            StorageError: the disk is full.
        """
        try:
            for number, source in enumerate(self._sources):
                if only is not None and number not in only:
                    continue
                with self._collected():
                    self._read_source(number, source, spill, advance)
                source.check_unchanged()
            spill.flush()
            if isinstance(self._format, DropsResponses):
                with self._collected():
                    self.left_out.update(self._format.finish())
            for number, source in enumerate(self._sources):
                if only is None or number in only:
                    self.left_out.update(source.left_out())
        finally:
            for source in self._sources:
                source.on_refused = None

    @contextmanager
    def _collected(self) -> Iterator[None]:
        """Collect a DataError about a whole input with the broken rows if the import will stop."""
        try:
            yield
        except DataError as error:
            if self.broken.drops or error is self.broken.raised:
                raise
            self.broken.add(error)
        except ConfigError as error:
            found = self.broken.error()
            if self.broken.drops or found is None:
                raise
            raise with_more(found, f"Also {error}") from error

    def _read_source(
        self, number: int, source: Source, spill: FragmentSpill, advance: Advance
    ) -> None:
        default = self._config.sampler or source.name

        def refused(error: DataError, record: Mapping[str, Any] | None) -> None:
            group, samplers = row_names(record, self._config, default, self._chat)
            self._refuse(error, group, samplers)

        source.on_refused = refused
        media = getattr(self._format, "media_columns", MEDIA)
        rows = text_rows(source, self._format.columns, advance, media=media)
        for fragment in self._format.read(rows, source):
            fragment.file = number
            fragment.written_ends(self._ends)
            try:
                self._chat.apply(fragment, source.label)
                check_fragment(fragment, self._config, vocab_size=self._vocab_size)
            except DataError as error:
                place = with_location(
                    error, file=source.label, row=fragment.row, group=fragment.group_id
                )
                samplers = Counter(name or default for name in fragment.samplers)
                self._refuse(place, _group_id(fragment), samplers)
                continue
            self._needs.check(fragment, source.label)
            key = prompt_key(fragment)
            if fragment.group_id is None:
                fragment.group_id = key[:GROUP_ID_DIGITS]
            self._note(fragment, source, default)
            if self.broken.drops or not self.broken.total:
                spill.add(fragment, key)

    def _refuse(self, error: DataError, group: str | None, samplers: Mapping[str, int]) -> None:
        if group is not None:
            self.reduced.add(group)
        self.broken.add(error, group=group, samplers=samplers)

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
            DataError: rows break a rule and `on_error` is stop, there is no row, or only some rows
                have a reward.
            ConfigError: `samplers` names a sampler that no row has.
        """
        if not sum(self.rows) and (self.broken.drops or not self.broken.total):
            dropped = f"{self.broken.total:,} broken rows only (on_error: drop)"
            left_out = [f"{reason} {n}" for reason, n in self.left_out.items() if n]
            none = (
                f"no row to import; {', '.join(left_out)}" if left_out else "inputs without a row"
            )
            raise DataError(
                "an import yields at least 1 group",
                received=dropped if self.broken.total else none,
                remedy="check the inputs",
                file=self._sources[0].label,
                more=summary_lines(summary(self.broken.records)),
            )
        if self.rewarded and self.unrewarded:
            mixed = DataError(
                "every row has a reward, or none has",
                received=f"rewards at {self.rewarded} and none at {self.unrewarded}",
                remedy="score the other rows, or import the two logs as two datasets",
            )
            if self.broken.drops:
                raise mixed
            self.broken.add(mixed)
        if not self.broken.drops and (error := self.broken.error()) is not None:
            raise error
        unknown = sorted(set(self._config.samplers) - self.samplers)
        if unknown:
            raise ConfigError(
                "samplers has settings only of samplers that are in the log",
                received=f"{', '.join(unknown)}; the log has {', '.join(sorted(self.samplers))}",
                remedy="correct the names, or set `sampler` or columns.sampler",
            )


def _group_id(fragment: Fragment) -> str | None:
    """The id of a fragment's group, or None if a fragment without an id has no prompt either."""
    if fragment.group_id is not None:
        return fragment.group_id
    try:
        return prompt_key(fragment)[:GROUP_ID_DIGITS]
    except DataError:
        return None
