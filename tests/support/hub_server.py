"""A small Hugging Face Hub on loopback with dataset repositories in memory, for unmodified
clients: huggingface_hub, `datasets` and fsspec's `hf://`.

It supports commits (each a whole tree), branches, LFS objects, private repositories, read and write
tokens, and byte ranges. It does not support Xet, which `environment()` disables. huggingface_hub
reads HF_ENDPOINT at import, so clients must run in separate processes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import yaml
from support.loopback import LoopbackServer, drop, send

READ, WRITE = "hf_may_read", "hf_may_write"
_DATE = "2026-01-02T03:04:05.000Z"
_LFS_BYTES = 2000  # the real one: 10 MB, and every .parquet file
_API = re.compile(
    r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|preupload|commit|branch)/(.+))?"
)
_RESOLVE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_BATCH = re.compile(r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class Repo:
    """One dataset repository.

    Attributes:
        commits: for each commit sha, the SHA-256 of each path's content.
        branches: for each branch its commit sha.
        messages: commit messages in order.
    """

    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: dict[str, str], message: str) -> str:
        """Set `branch` to a new commit with `tree`; returns its sha."""
        self.messages.append(message)
        text = json.dumps([self.branches.get(branch), tree, message])
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        """The commit sha of a branch, or of a commit sha."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class _RefusedError(Exception):
    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(code)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class HubServer(LoopbackServer):
    """The hub.

    Attributes:
        repos: repositories by id.
        blobs: contents by SHA-256.
        requests: (method, path, bytes sent) of every answered request.
        faults: called with method and path before an answer; returns "drop" to close the
            connection, "cut" to send half of a body, a status to respond with, or None.
        served: called with path and content of a download; returns the content to send.
    """

    methods: ClassVar[tuple[str, ...]] = ("GET", "HEAD", "POST", "PUT")

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.faults: Callable[[str, str], str | int | None] = lambda method, path: None
        self.served: Callable[[str, bytes], bytes] = lambda path, content: content
        super().__init__()
        self.endpoint = self.url.removesuffix("/v1")

    def environment(self, home: Path, token: str | None = WRITE) -> dict[str, str]:
        """Environment variables of a client process; its caches are in `home`."""
        values = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return values if token is None else {**values, "HF_TOKEN": token}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a revision with its content."""
        repo = self.repos[repo_id]
        sha = repo.sha(revision)
        assert sha is not None, revision
        return {path: self.blobs[oid] for path, oid in repo.commits[sha].items()}

    def put(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit `files` on top of the newest commit of a repository, as another user would."""
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(private=False))
            tree = dict(repo.commits.get(repo.branches.get(branch, ""), {}))
            for path, content in files.items():
                tree[path] = self._keep(content)
            return repo.commit(branch, tree, "by hand")

    def _keep(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.blobs[oid] = content
        return oid

    # ---- requests ----

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlsplit(handler.path)
        path = urllib.parse.unquote(url.path)
        body = self._body(handler)
        fault = self.faults(handler.command, path)
        if fault == "drop":
            drop(handler)
            return
        try:
            if isinstance(fault, int):
                raise _RefusedError(fault, "Injected")
            if (found := _RESOLVE.fullmatch(path)) is not None:
                self._resolve(handler, *found.groups())
            elif path.startswith("/cdn/"):
                self._send_content(handler, path.rpartition("/")[2], cut=fault == "cut")
            else:
                with self.lock:
                    value = self._json(handler, path, url.query, body)
                self._reply(handler, 200, value)
        except _RefusedError as refused:
            self._reply(handler, refused.status, {"error": str(refused)}, refused.headers)

    def _body(self, handler: BaseHTTPRequestHandler) -> bytes:
        if handler.headers.get("Transfer-Encoding") != "chunked":
            return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        pieces = []
        while (length := int(handler.rfile.readline(), 16)) > 0:
            pieces.append(handler.rfile.read(length))
            handler.rfile.readline()
        handler.rfile.readline()
        return b"".join(pieces)

    def _reply(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        value: Any,
        headers: dict[str, str] | None = None,
    ) -> None:
        text = json.dumps(value)
        self.requests.append((handler.command, handler.path, len(text)))
        send(handler, status, "" if handler.command == "HEAD" else text, headers)

    def _json(self, handler: BaseHTTPRequestHandler, path: str, query: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            return self._create(handler, json.loads(body))
        if path == "/api/validate-yaml":
            return _checked_card(json.loads(body)["content"])
        if (found := _BATCH.fullmatch(path)) is not None:
            self._repo(handler, found.group(1), write=True)
            return {"objects": [self._upload(o) for o in json.loads(body)["objects"]]}
        if path.startswith("/upload/"):
            if self._keep(body) != path.rpartition("/")[2]:
                raise _RefusedError(400, "OtherContent")
            return {}
        found = _API.fullmatch(path)
        if found is None:
            raise _RefusedError(404, "NoSuchEndpoint")
        repo_id, verb, rest = found.groups()
        return self._about(handler, repo_id, verb, rest or "main", query, body)

    def _about(
        self,
        handler: BaseHTTPRequestHandler,
        repo_id: str,
        verb: str | None,
        rest: str,
        query: str,
        body: bytes,
    ) -> Any:
        repo = self._repo(handler, repo_id, write=verb in ("preupload", "commit", "branch"))
        if verb == "branch":
            if rest in repo.branches:
                raise _RefusedError(409, "Conflict")
            repo.branches[rest] = repo.branches["main"]
            return {}
        revision, _, inner = rest.partition("/") if verb == "tree" else (rest, "", "")
        sha = self._sha(repo, revision)
        tree = repo.commits[sha]
        if verb in (None, "revision"):
            return self._info(repo_id, repo, sha)
        if verb == "tree":
            return _listing(self, tree, inner, recursive="recursive=true" in query.lower(), sha=sha)
        if verb == "paths-info":
            wanted = _form(handler, body)
            return [e for p in wanted for e in _entries(self, tree, p, sha)]
        if verb == "preupload":
            return {"files": [self._mode(tree, file) for file in json.loads(body)["files"]]}
        return self._commit(repo_id, repo, revision, body)

    def _repo(self, handler: BaseHTTPRequestHandler, repo_id: str, *, write: bool = False) -> Repo:
        token = self._token(handler)
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and token is None):
            raise _RefusedError(404 if token else 401, "RepoNotFound", "Repository not found")
        if write and token != WRITE:
            raise _RefusedError(403 if token else 401, "Forbidden", "you may not write here")
        return repo

    def _token(self, handler: BaseHTTPRequestHandler) -> str | None:
        token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in (READ, WRITE):
            raise _RefusedError(401, "", "Invalid credentials in Authorization header")
        return token or None

    def _sha(self, repo: Repo, revision: str) -> str:
        sha = repo.sha(revision)
        if sha is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _info(self, repo_id: str, repo: Repo, sha: str) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        dates = {"lastModified": _DATE, "createdAt": _DATE}
        own = {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings}
        return {**own, **dates, "tags": [], "gated": False, "disabled": False}

    def _create(self, handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> dict[str, str]:
        token = self._token(handler)
        if token != WRITE:
            raise _RefusedError(403 if token else 401, "Forbidden", "you may not create one")
        repo_id = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        if asked.get("type") != "dataset":
            raise _RefusedError(400, "NotADataset")
        if repo_id in self.repos:
            raise _RefusedError(409, "Conflict", "You already created this dataset repo")
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repo = self.repos[repo_id] = Repo(private=private)
        oid = self._keep(b"*.parquet filter=lfs diff=lfs merge=lfs -text\n")
        repo.commit("main", {".gitattributes": oid}, "initial commit")
        return {"url": f"{self.endpoint}/datasets/{repo_id}"}

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.blobs:
            return wanted
        return {
            **wanted,
            "actions": {"upload": {"href": f"{self.endpoint}/upload/{wanted['oid']}"}},
        }

    def _mode(self, tree: dict[str, str], file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".parquet") or file["size"] > _LFS_BYTES
        held = tree.get(file["path"])
        return {
            "path": file["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            **({} if held is None else {"oid": self.oid(held)}),
        }

    def oid(self, sha256: str) -> str:
        """Object id of a content: SHA-256 for LFS files, else git's SHA-1."""
        content = self.blobs[sha256]
        if self.is_large(sha256):
            return sha256
        whole = b"blob %d\0" % len(content) + content
        return hashlib.sha1(whole, usedforsecurity=False).hexdigest()

    def is_large(self, sha256: str) -> bool:
        """Whether a content is stored in LFS."""
        return len(self.blobs[sha256]) > _LFS_BYTES or self.blobs[sha256][:4] == b"PAR1"

    def _commit(self, repo_id: str, repo: Repo, branch: str, body: bytes) -> dict[str, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise _RefusedError(412, "Conflict", "A commit has happened since")
        tree = dict(repo.commits[repo.branches[branch]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = self._keep(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise _RefusedError(400, "NoSuchObject")
                tree[value["path"]] = value["oid"]
            else:
                raise _RefusedError(400, "NotImplemented")
        sha = repo.commit(branch, tree, header["summary"])
        url = f"{self.endpoint}/datasets/{repo_id}/commit/{sha}"
        return {"commitUrl": url, "commitOid": sha, "success": True}

    # ---- downloads ----

    def _resolve(
        self, handler: BaseHTTPRequestHandler, repo_id: str, revision: str, path: str
    ) -> None:
        with self.lock:
            repo = self._repo(handler, repo_id)
            sha = self._sha(repo, revision)
            oid = repo.commits[sha].get(path)
        if oid is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        large = self.is_large(oid)
        size = len(self.blobs[oid])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{self.oid(oid)}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(size)}
            # As on the real hub, from another host, to which the client sends no token.
            elsewhere = self.endpoint.replace("127.0.0.1", "localhost")
            headers["Location"] = f"{elsewhere}/cdn/{urllib.parse.quote(path)}/{oid}"
            self._reply(handler, 302, {}, headers)
        else:
            self._send_content(handler, oid, headers=headers)

    def _send_content(
        self,
        handler: BaseHTTPRequestHandler,
        oid: str,
        *,
        cut: bool = False,
        headers: dict[str, str] | None = None,
    ) -> None:
        content = self.served(urllib.parse.unquote(handler.path), self.blobs[oid])
        status, sent = 200, content
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", handler.headers.get("Range") or "")
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes", **(headers or {})}
        if found is not None:
            first, last = found.groups()
            start = int(first) if first else max(len(content) - int(last), 0)
            stop = min(int(last) + 1, len(content)) if first and last else len(content)
            if start >= len(content):
                raise _RefusedError(416, "Range")
            status, sent = 206, content[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.requests.append((handler.command, handler.path, len(sent)))
        handler.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(sent)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(sent[: len(sent) // 2] if cut else sent)
        if cut:
            drop(handler)


def _checked_card(content: str) -> dict[str, Any]:
    """The hub's validation of a card: an error if its front matter is not a mapping, or if a
    configuration has no name and files.
    """
    found = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
    value = yaml.safe_load(found.group(1)) if found else {}
    good = isinstance(value, dict) and all(
        {"config_name", "data_files"} <= set(config) for config in value.get("configs", [])
    )
    return {"errors": [] if good else [{"message": "bad front matter"}], "warnings": []}


def _form(handler: BaseHTTPRequestHandler, body: bytes) -> list[str]:
    """The requested paths, from a JSON or form body."""
    if "json" in (handler.headers.get("Content-Type") or ""):
        asked = json.loads(body)["paths"]
        return [asked] if isinstance(asked, str) else list(asked)
    return urllib.parse.parse_qs(body.decode()).get("paths", [])


def _entries(hub: HubServer, tree: dict[str, str], path: str, sha: str) -> Iterable[dict[str, Any]]:
    last = {"id": sha, "title": "a commit", "date": _DATE}
    if path in tree:
        oid = tree[path]
        entry = {"type": "file", "oid": hub.oid(oid), "size": len(hub.blobs[oid]), "path": path}
        if hub.is_large(oid):
            entry["lfs"] = {"oid": oid, "size": len(hub.blobs[oid]), "pointerSize": 130}
        yield {**entry, "lastCommit": last}
    elif any(name.startswith(path + "/") for name in tree):
        yield {"type": "directory", "oid": sha, "size": 0, "path": path, "lastCommit": last}


def _listing(
    hub: HubServer, tree: dict[str, str], folder: str, *, recursive: bool, sha: str
) -> list[dict[str, Any]]:
    prefix = folder.rstrip("/") + "/" if folder else ""
    inside = [name for name in tree if name.startswith(prefix)]
    if folder and not inside:
        raise _RefusedError(404, "EntryNotFound", f"{folder} does not exist")
    names: dict[str, None] = {}
    for name in inside:
        parts = name[len(prefix) :].split("/")
        depths = range(1, len(parts) + 1) if recursive else [1]
        names |= {prefix + "/".join(parts[:depth]): None for depth in depths}
    return [entry for name in names for entry in _entries(hub, tree, name, sha)]
