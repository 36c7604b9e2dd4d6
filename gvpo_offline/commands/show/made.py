"""What `import` and `sample` print at their end: one group, and how the responses end."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gvpo_offline.commands.show.text import excerpt, last_tokens
from gvpo_offline.errors import GVPOError
from gvpo_offline.group import Group
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.token_texts import TokenTexts, texts_of

_LAST_CHARACTERS = 60
_LAST_TOKENS = 3
_SHOWN_ENDS = 4


def made_lines(path: str | Path) -> list[str]:
    """The first group of a dataset in a few lines, and how the responses of a row group end.

    An error while it is shown becomes a line: the dataset is complete all the same.
    """
    try:
        return list(_lines(path))
    except GVPOError as error:
        return [f"its first group cannot be shown: {error}"]


def _lines(path: str | Path) -> Iterator[str]:
    dataset = open_dataset(path, join=())
    if not dataset.n_groups:
        return
    texts, about = texts_of(dataset.manifest)
    if texts is None and dataset.manifest.tokenizer is not None:
        yield f"tokenizer: {about}"
    groups = next(filter(None, map(dataset.groups, range(dataset.n_row_groups))))
    group = groups[0]
    # A response that was not cut shows more: its end.
    shown = group.truncated.index(False) if False in group.truncated else 0
    ids = group.response_token_ids[shown]
    few = _LAST_CHARACTERS // 2
    command = shlex.join(["gvpo-offline", "show", str(path)])
    yield f"the first group as the model reads it ({command} prints more):"
    yield f"  prompt    {excerpt(texts, group.prompt_token_ids, first=0, last=_LAST_CHARACTERS)}"
    yield f"  response  {excerpt(texts, ids, first=few, last=few)}"
    yield f"  its end   {last_tokens(texts, ids, _LAST_TOKENS)}"
    yield from ends_lines(groups, texts)
    if len(groups) < dataset.n_groups:
        yield f"(counted in the first {len(groups):,} of {dataset.n_groups:,} groups)"


def ends_lines(groups: list[Group], texts: TokenTexts | None) -> Iterator[str]:
    """How the responses of some groups end: counts by last token, of those that were cut apart."""
    ended: Counter[int] = Counter()
    cut: Counter[int] = Counter()
    for group in groups:
        for ids, truncated in zip(group.response_token_ids, group.truncated, strict=True):
            (cut if truncated else ended)[int(ids[-1])] += 1
    known = ended.keys() if texts is None else ended.keys() & texts.ends.keys()
    named = Counter({last: n for last, n in ended.items() if last in known})
    total = ended.total()
    if len(ended) == 1 and named:
        which = "each response that was not cut" if cut else "each response"
        yield f"{which} ends with {_name(next(iter(named)), texts)}"
    elif ended:
        of = f"of {total:,} responses that were not cut"
        # A tokenizer has few end tokens; without one, every id may be one.
        first = named.most_common(_SHOWN_ENDS if texts is None else None)
        yield from (f"{n:,} {of} end with {_name(last, texts)}" for last, n in first)
        rest = ended - Counter(dict(first))
        if rest and texts is None:
            yield f"{rest.total():,} {of} end with other ids"
        elif rest and texts is not None:
            example = texts.token(rest.most_common(1)[0][0])
            yield (
                f"{rest.total():,} {of} end without an end token, such as {example}: "
                "the policy does not learn to stop after them"
            )
    if cut:
        yield _cut_line(cut, total + cut.total(), texts)


def _cut_line(cut: Counter[int], total: int, texts: TokenTexts | None) -> str:
    """How many of all responses were cut, and how they end."""
    line = f"{cut.total():,} of {total:,} responses were cut"
    if texts is None:
        return line
    n = sum(count for last, count in cut.items() if last in texts.ends)
    if not n:
        return f"{line}, so they have no end token"
    return f"{line}; {n:,} of them {'ends' if n == 1 else 'end'} with an end token all the same"


def _name(last: int, texts: TokenTexts | None) -> str:
    if texts is None:
        return f"id {last}"
    return f"{texts.token(last).text} (id {last}), {texts.ends[last]}"
