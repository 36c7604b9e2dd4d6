"""What `import` and `sample` print at their end: one group, and how the responses end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gvpo_offline.commands.show.text import excerpt, last_tokens
from gvpo_offline.commands.show.tokens import TokenTexts, texts_of
from gvpo_offline.errors import GVPOError
from gvpo_offline.group import Group
from gvpo_offline.store.dataset import open_dataset

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
    yield f"the first group as the model reads it (gvpo-offline show {path} prints more):"
    yield f"  prompt    {excerpt(texts, group.prompt_token_ids, first=0, last=_LAST_CHARACTERS)}"
    yield f"  response  {excerpt(texts, ids, first=few, last=few)}"
    yield f"  its end   {last_tokens(texts, ids, _LAST_TOKENS)}"
    yield from ends_lines(groups, texts)


def ends_lines(groups: list[Group], texts: TokenTexts | None) -> Iterator[str]:
    """How the responses of some groups end: counts by last token; those that were cut apart."""
    ended: Counter[int] = Counter()
    cut = n_cut_ended = 0
    for group in groups:
        for ids, truncated in zip(group.response_token_ids, group.truncated, strict=True):
            last = int(ids[-1])
            cut += truncated
            n_cut_ended += truncated and texts is not None and last in texts.ends
            ended[last] += not truncated
    ended = +ended
    whole = ended.total()
    named = {last: n for last, n in ended.items() if texts is None or last in texts.ends}
    if len(ended) == 1 and named:
        (last,) = ended
        which = "each response that was not cut" if cut else "each response"
        yield f"{which} ends with {_name(last, texts)}"
    else:
        for last, n in Counter(named).most_common(_SHOWN_ENDS):
            yield f"{n:,} of {whole:,} responses that were not cut end with {_name(last, texts)}"
        rest = whole - sum(n for _, n in Counter(named).most_common(_SHOWN_ENDS))
        if rest and texts is None:
            yield f"{rest:,} of {whole:,} responses that were not cut end with other ids"
        elif rest:
            others = Counter({last: n for last, n in ended.items() if last not in named})
            example = f", such as {texts.token(others.most_common(1)[0][0])}" if others else ""
            yield (
                f"{rest:,} of {whole:,} responses that were not cut end without an end token"
                f"{example}: the policy does not learn to stop after them"
            )
    if cut:
        how = ", so they have no end token" if texts else ""
        if n_cut_ended:
            verb = "ends" if n_cut_ended == 1 else "end"
            how = f"; {n_cut_ended:,} of them {verb} with an end token all the same"
        yield f"{cut:,} of {whole + cut:,} responses were cut{how}"
    if len(groups) > 1:
        yield f"(counted in the first {len(groups):,} groups)"


def _name(last: int, texts: TokenTexts | None) -> str:
    if texts is None:
        return f"id {last}"
    what = f", {texts.ends[last]}" if last in texts.ends else ""
    return f"{texts.token(last).text} (id {last}){what}"
