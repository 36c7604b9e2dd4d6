"""Runs `gvpo-offline show`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

from gvpo_offline.commands.console import emit, has_styles
from gvpo_offline.commands.settings import ShowConfig
from gvpo_offline.commands.show.find import ShownDataset
from gvpo_offline.commands.show.record import record
from gvpo_offline.commands.show.text import Printer, Style, header
from gvpo_offline.token_texts import texts_of


def show(config: ShowConfig) -> None:
    """Print groups as the model reads them, each as soon as it is read.

    Raises:
        ConfigError: there is no such group, reward, reference or tokenizer.
        DataError: a group breaks a rule.
        IntegrityError: a file is damaged, or `tokenizer_name_or_path` is not the dataset's.
    """
    try:
        for line in show_lines(config, Style(has_styles())):
            emit(line)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe (head, less) has enough; Python would complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_lines(config: ShowConfig, style: Style) -> Iterator[str]:
    """The lines that `show` prints; errors as `show`."""
    opened = ShownDataset(config)
    texts, tokenizer = texts_of(
        opened.manifest, config.tokenizer_name_or_path, config.chat_template
    )
    if config.json:
        for shown in opened.groups():
            yield json.dumps(record(shown, texts))
        return
    facts = [f"{opened.base.n_groups:,} groups"]
    if opened.is_dataset:
        facts.insert(0, f"version {opened.manifest.version}")
    printer = Printer(texts, style, full=config.full, prompt_tokens=config.prompt_tokens)
    above = header(config.dataset, facts, tokenizer)
    for shown in opened.groups():
        yield from above  # not above the error that there is no such group
        yield ""
        yield from printer.lines(shown)
        above = []
    yield from above
