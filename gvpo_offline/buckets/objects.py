"""Requests to the objects under one s3:// URL: conditional puts, multipart uploads, listings.

Every request has a timeout and is tried again after a server error, a broken connection or a
timeout. Errors name the object's URL and the remedy, never a credential.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from gvpo_offline.errors import ConfigError, StorageError
from gvpo_offline.files import owned_file
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.store.remote.folder import RemoteFolder

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

PART_BYTES = 16 * 2**20  # of a multipart upload; S3 takes 10,000 parts of at least 5 MiB
_MOST_PARTS = 10_000
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 30.0
_JITTER = random.SystemRandom()
_RETRIED_STATUS = {408, 409, 425, 429}
_CREDENTIALS = "check the URL, and the credentials in the environment or remote.storage_options"


class ConditionFailed(Exception):  # noqa: N818 - an answer, which every caller handles
    """The object is not as the request's If-Match or If-None-Match says."""


@dataclass(frozen=True)
class Listed:
    """An object of a listing: its length in bytes, and its ETag."""

    bytes: int
    etag: str


@dataclass(frozen=True)
class Got:
    """An object: content, ETag, and seconds since it was written, by the server's clock."""

    content: bytes
    etag: str
    age: float


@dataclass(frozen=True)
class Upload:
    """A multipart upload that is not complete: its path within the folder, and its id."""

    path: str
    id: str


class Objects:
    """The objects under an s3:// URL. Threads may share it.

    Every method raises StorageError if the server refuses or the last attempt fails.

    Args:
        url: of the folder.
        settings: timeout, attempts and options of the file system.

    Raises:
        ConfigError: the URL is not one of a bucket, or s3fs is not installed.
    """

    def __init__(self, url: str, settings: RemoteSettings) -> None:
        if url.split("://", 1)[0] not in ("s3", "s3a"):
            raise ConfigError(
                "a dataset is written to a local folder or an s3:// URL, whose store has "
                "conditional puts (If-None-Match and If-Match)",
                received=url,
                remedy="write to a local folder and copy it, or use an S3-compatible store",
            )
        options = {"skip_instance_cache": True, **settings.storage_options}
        folder = RemoteFolder(
            url, RemoteSettings(storage_options=options, timeout=settings.timeout)
        )
        self.url = folder.url
        self._fs = folder._state.fs
        self._fs.retries = 1  # its own attempts would multiply with those here
        self._settings = settings
        bucket, _, prefix = self.url.split("://", 1)[1].partition("/")
        self.bucket, self.prefix = bucket, prefix.strip("/")
        if not self.prefix:
            raise ConfigError(
                "a dataset lies in a folder of a bucket",
                received=url,
                remedy="name one: s3://bucket/name",
            )

    def url_of(self, path: str) -> str:
        """The URL of an object."""
        return f"{self.url}/{path}" if path else self.url

    def get(self, path: str) -> Got:
        """An object's content; FileNotFoundError if there is none."""

        async def get() -> Got:
            found = await self._fs._call_s3("get_object", **self._key(path))
            async with found["Body"] as body:
                content = await body.read()
            return Got(content, found["ETag"], _age(found))

        return self._tried("read", path, get)

    def download(self, path: str, target: Path) -> None:
        """Write an object to a local file, complete or not at all.

        Raises:
            FileNotFoundError: there is no such object.
        """
        size = self._tried(
            "read", path, lambda: self._fs._call_s3("head_object", **self._key(path))
        )
        whole, etag = int(size["ContentLength"]), size["ETag"]
        target.parent.mkdir(parents=True, exist_ok=True)
        with owned_file(target) as (file, temporary):
            for start in range(0, whole, PART_BYTES):
                span = f"bytes={start}-{min(start + PART_BYTES, whole) - 1}"
                file.write(self._part(path, span, etag))
            file.flush()
            temporary.replace(target)

    def _part(self, path: str, span: str, etag: str) -> bytes:
        async def get() -> bytes:
            key = self._key(path)
            found = await self._fs._call_s3("get_object", Range=span, IfMatch=etag, **key)
            async with found["Body"] as body:
                return bytes(await body.read())

        return self._tried("read", path, get)

    def put(self, path: str, content: bytes, **condition: str) -> str:
        """Write an object whole; returns its ETag.

        Args:
            path: of the object.
            content: its bytes.
            condition: `IfNoneMatch="*"`: there is none yet; `IfMatch=etag`: it has this ETag.

        Raises:
            ConditionFailed: the condition does not hold, and the object has other bytes.
        """

        async def put() -> str:
            key = self._key(path)
            found = await self._fs._call_s3("put_object", Body=content, **key, **condition)
            return str(found["ETag"])

        try:
            return self._tried("written", path, put)
        except (ConditionFailed, FileNotFoundError) as error:
            try:  # the answer of an earlier attempt may have been lost
                found = self.get(path)
            except FileNotFoundError:
                raise ConditionFailed from error
            if found.content != content:
                raise ConditionFailed from error
            return found.etag

    def upload(self, path: str, source: Path) -> None:
        """Write an object with the content of a local file, in parts if it is long."""
        size = source.stat().st_size
        if size <= PART_BYTES:
            self.put(path, source.read_bytes())
            return
        key = self._key(path)
        part_bytes = max(PART_BYTES, -(-size // _MOST_PARTS))
        begun = self._asked("written", path, "create_multipart_upload", **key)
        upload = {**key, "UploadId": begun["UploadId"]}
        try:
            parts = []
            with source.open("rb") as file:
                for number in range(1, -(-size // part_bytes) + 1):
                    body = file.read(part_bytes)
                    done = self._asked(
                        "written", path, "upload_part", PartNumber=number, Body=body, **upload
                    )
                    parts.append({"PartNumber": number, "ETag": done["ETag"]})
            try:
                whole = {"Parts": parts}
                self._asked(
                    "written", path, "complete_multipart_upload", MultipartUpload=whole, **upload
                )
            except FileNotFoundError:  # no such upload: the answer of an earlier attempt was lost
                if self.listing(path).get(path, Listed(-1, "")).bytes != size:
                    raise
        except BaseException:
            self._abort_quietly(Upload(path, begun["UploadId"]))
            raise

    def delete(self, path: str) -> None:
        """Delete an object; nothing if there is none."""
        self._asked("deleted", path, "delete_object", **self._key(path))

    def listing(self, under: str = "") -> dict[str, Listed]:
        """The objects whose path begins with `under`, by path."""
        found: dict[str, Listed] = {}
        more: dict[str, Any] = {}
        prefix = f"{self.prefix}/{under}"
        while True:
            page = self._asked(
                "listed", under, "list_objects_v2", Bucket=self.bucket, Prefix=prefix, **more
            )
            for item in page.get("Contents", ()):
                name = item["Key"][len(self.prefix) + 1 :]
                found[name] = Listed(int(item["Size"]), item["ETag"])
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def uploads(self) -> list[Upload]:
        """The multipart uploads under the URL that are not complete."""
        found: list[Upload] = []
        more: dict[str, Any] = {}
        place = {"Bucket": self.bucket, "Prefix": f"{self.prefix}/"}
        while True:
            page = self._asked("listed", "", "list_multipart_uploads", **place, **more)
            for item in page.get("Uploads", ()):
                if item["Key"].startswith(place["Prefix"]):
                    name = item["Key"][len(place["Prefix"]) :]
                    found.append(Upload(name, item["UploadId"]))
            if not page.get("IsTruncated"):
                return sorted(found, key=lambda own: (own.path, own.id))
            more = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def abort(self, upload: Upload) -> None:
        """Abort a multipart upload, whose parts are then deleted; nothing if it is gone."""
        key = self._key(upload.path)
        with contextlib.suppress(FileNotFoundError):
            self._asked("deleted", upload.path, "abort_multipart_upload", UploadId=upload.id, **key)

    def _abort_quietly(self, upload: Upload) -> None:
        try:
            self.abort(upload)
        except Exception as error:  # the error of the upload says more
            logger.info("%s: not aborted (%s)", self.url_of(upload.path), type(error).__name__)

    def _key(self, path: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{path}"}

    def _asked(self, done: str, path: str, method: str, **arguments: Any) -> Any:
        return self._tried(done, path, lambda: self._fs._call_s3(method, **arguments))

    def _tried(self, done: str, path: str, call: Callable[[], Awaitable[Result]]) -> Result:
        """The result of the coroutine that `call` makes, tried as often as the settings say."""
        from fsspec.asyn import sync

        async def once() -> Result:
            return await call()

        failure: Exception | None = None
        for attempt in range(self._settings.attempts):
            if attempt:
                wait = min(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1), _LONGEST_WAIT_SECONDS)
                time.sleep(wait * _JITTER.uniform(0.5, 1.0))
            try:
                result: Result = sync(self._fs.loop, once, timeout=self._settings.timeout)
                return result
            except Exception as error:
                self._raise_if_final(error, done, path)
                failure = error
                logger.info("%s: %s; trying again", self.url_of(path), _described(error))
        raise StorageError(
            f"an object of the bucket can be {done}",
            received=f"{_described(failure)}, at the last of {self._settings.attempts} attempts",
            remedy="run the same command again when network and server work: it goes on from what "
            "is committed; remote.attempts and remote.timeout set how often and how long a request "
            "is tried",
            file=self.url_of(path),
        ) from failure

    def _raise_if_final(self, error: Exception, done: str, path: str) -> None:
        """Raise if another attempt would fail in the same way."""
        code, status = _code_and_status(error)
        if code == "NoSuchBucket":
            raise StorageError(
                "the bucket exists",
                received=f"no bucket {self.bucket}",
                remedy="create it, or correct the URL",
                file=self.url_of(path),
            ) from error
        if isinstance(error, FileNotFoundError) or status == 404:
            raise FileNotFoundError(self.url_of(path)) from error
        if status == 412 or code == "PreconditionFailed":
            raise ConditionFailed from error
        if status == 501 or code == "NotImplemented":
            raise without_conditions(self.url) from error
        refused = status is not None and 400 <= status < 500 and status not in _RETRIED_STATUS
        if code in ("RequestTimeout", "RequestTimeTooSkewed", "BadDigest"):
            refused = code == "RequestTimeTooSkewed"
        if refused or "Credential" in type(error).__name__ or isinstance(error, PermissionError):
            raise StorageError(
                f"the server lets this machine have the object {done}",
                received=_described(error),
                remedy=_CREDENTIALS,
                file=self.url_of(path),
            ) from error
        if isinstance(error, TypeError | ValueError) and status is None:
            raise StorageError(
                "a request of s3fs follows botocore's parameters",
                received=_described(error),
                remedy="install s3fs and aiobotocore of the versions in constraints.txt, and "
                "correct remote.storage_options",
                file=self.url_of(path),
            ) from error


def without_conditions(url: str) -> ConfigError:
    """The error for a store that ignores or lacks conditional puts."""
    return ConfigError(
        "the store of a dataset that is written to has conditional puts (If-None-Match, If-Match)",
        received="a store that ignores or refuses them",
        remedy="use a newer version of the store, or write to a local folder and copy it",
        file=url,
    )


def _code_and_status(error: Exception) -> tuple[str | None, int | None]:
    """The S3 error code and HTTP status behind an error of s3fs; None where there is none."""
    for found in (error, error.__cause__):
        answer = getattr(found, "response", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return answer.get("Error", {}).get("Code"), status
    return None, None


def _age(answer: dict[str, Any]) -> float:
    """Seconds between the write of an object and the answer, both by the server's clock."""
    date = answer["ResponseMetadata"]["HTTPHeaders"]["date"]
    return float((parsedate_to_datetime(date) - answer["LastModified"]).total_seconds())


def _described(error: Exception | None) -> str:
    """Type, code and status of an error; its text only where the server has no code."""
    if error is None:
        return "nothing"
    code, status = _code_and_status(error)
    if code is not None:
        return f"{code} (HTTP {status})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
