"""Base classes of what a manifest holds."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Record(BaseModel):
    """A record of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class WithoutDefaults(Record):
    """A record whose fields named in `_left_out` are written only where they differ from their
    default: manifests without them keep their bytes, and earlier versions of the package read them.
    """

    _left_out: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = serialize(self)
        for name in self._left_out:
            if getattr(self, name) == type(self).model_fields[name].default:
                plain.pop(name, None)
        return plain
