"""JSON files that contain the SHA-256 of their own content: manifests and commit records.

The hash is over the JSON in the file, not over the parsed model, so that other writers may omit
fields with defaults.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gvpo_offline.errors import IntegrityError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.json_text import has_surrogates

Content = TypeVar("Content", bound=BaseModel)


def sealed_text(name: str, content: BaseModel, left_out: Collection[str] = ()) -> str:
    """The text of a file: a JSON object with the keys `sha256` and `name`.

    Args:
        name: key of the content.
        content: the content.
        left_out: its fields that are not written.
    """
    # Through JSON, since it turns NaN into null, and the hash must be of what is in the file.
    plain = json.loads(content.model_dump_json(exclude=set(left_out) or None))
    return json.dumps({"sha256": sha256_json(plain), name: plain}, indent=1, ensure_ascii=False)


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Disable the garbage collector: its passes over a growing manifest free nothing, and take
    longer than parsing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parse_json(data: bytes, path: Path | str, rule: str, remedy: str) -> Any:
    """The JSON in the bytes of a file in UTF-8.

    Raises:
        IntegrityError: with `rule`, if it does not parse, or a text in it has no UTF-8: names of
            rewards and samplers become names of columns and files, and the next version could not
            be written.
    """
    try:
        with _without_collecting():
            found = json.loads(data.decode("utf-8-sig"))
        if has_surrogates(data, found):
            raise ValueError("text with half of a surrogate pair, which UTF-8 cannot hold")
        return found
    except (ValueError, RecursionError) as error:
        raise IntegrityError(rule, received=str(error), remedy=remedy, file=path) from error


def unsealed(
    kind: type[Content], name: str, sealed: Any, path: Path | str, rule: str, remedy: str
) -> Content:
    """The validated content of a sealed file.

    Args:
        kind: model of the content.
        name: key of the content.
        sealed: parsed JSON of the file.
        path, rule, remedy: of an error.

    Raises:
        IntegrityError: the content does not validate, or does not have the hash beside it.
    """
    if not isinstance(sealed, dict) or set(sealed) != {"sha256", name}:
        problem = f"no object of sha256 and {name}"
    else:
        try:
            with _without_collecting():
                content = kind.model_validate(sealed[name])
            if sha256_json(sealed[name]) == sealed["sha256"]:
                return content
            problem = "content that does not have the hash beside it"
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            problem = f"{first['msg']} at {'.'.join(map(str, first['loc']))}"
    raise IntegrityError(rule, received=problem, remedy=remedy, file=path)
