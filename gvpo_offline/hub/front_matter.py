"""The front matter of a card that is there already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import RepoCard


class FrontMatterError(ValueError):
    """The front matter of a card is no YAML mapping that can be read; the message says why."""


def read_card_text(kind: type[RepoCard], text: str) -> tuple[dict[str, Any], str]:
    """The fields of the front matter, and the text below it.

    Args:
        kind: ModelCard or DatasetCard.
        text: of the card.

    Raises:
        FrontMatterError: see there.
    """
    import yaml

    try:
        there = kind(text, ignore_metadata_errors=True)
        data: dict[str, Any] = there.data.to_dict()  # type: ignore[no-untyped-call]
    # Of the hub's library: no mapping is a ValueError; fields of other types than it expects raise
    # the other two.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FrontMatterError(" ".join(str(error).split())) from error
    return data, there.text


def listed(value: Any) -> list[str]:
    """A field of one text or of several, as a list of texts."""
    if value is None:
        return []
    return list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]
