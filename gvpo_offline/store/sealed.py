"""JSON files that carry the hash of their own content: manifests and commit records.

The hash is taken over the content as it stands in the file, not as this version of the code reads
it, so that a writer in another language may leave out what has a default.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gvpo_offline.errors import IntegrityError
from gvpo_offline.hashing import sha256_json

Content = TypeVar("Content", bound=BaseModel)


def sealed_text(name: str, content: BaseModel) -> str:
    """The text of a file: an object with `sha256` and, under `name`, `content`."""
    # Through JSON: what it cannot say (a setting that is not a number) becomes null, and must hash
    # as that.
    plain = json.loads(content.model_dump_json())
    return json.dumps({"sha256": sha256_json(plain), name: plain}, indent=1, ensure_ascii=False)


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Python's cycle collector off: walking a large manifest while it is built is all for nothing,
    and takes longer than building it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path: Path, rule: str, remedy: str) -> Any:
    """What a file holds; IntegrityError, stating `rule`, if that is not JSON."""
    return parse_json(path.read_bytes(), path, rule, remedy)


def parse_json(data: bytes, path: Path | str, rule: str, remedy: str) -> Any:
    """The content of a file as JSON; as `read_json`."""
    try:
        with _without_collecting():
            return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(rule, received=str(error), remedy=remedy, file=path) from error


def unsealed(
    kind: type[Content], name: str, sealed: Any, path: Path | str, rule: str, remedy: str
) -> Content:
    """The content of a sealed file.

    Args:
        kind: what the content must be.
        name: the key that it stands under.
        sealed: what the file holds.
        path, rule, remedy: for the message of an error.

    Raises:
        IntegrityError: the content is not of that kind, or is not what was sealed.
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
