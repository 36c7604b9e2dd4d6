"""Hostile files of outside: logs, prompts and settings, and the command that reads each."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.workshop import words_of

Make = Callable[[Path, Path], None]
_ESCAPE = "\x1b]0;owned\x07\x1b[31mred"


def _import(name: str, **settings: Any) -> list[str]:
    given = {"inputs": [name], "output_dir": "out", "show_progress": False, **settings}
    return ["import", *words_of(tokenizer_name_or_path="{model}", **given)]


def _sample(name: str) -> list[str]:
    batch = {"kind": "openai_batch", "model": "m", "responses": 2, "max_new_tokens": 4}
    return [
        "sample",
        *words_of(
            inputs=[name],
            output_dir="out",
            tokenizer_name_or_path="{model}",
            samplers={"b": batch},
            show_progress=False,
        ),
    ]


def _rows(name: str, *rows: Any, raw: bytes = b"") -> Make:
    def make(folder: Path, canary: Path) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / name).write_bytes(text + raw)

    return make


def _bytes(name: str, content: Callable[[], bytes]) -> Make:
    def make(folder: Path, canary: Path) -> None:
        (folder / name).write_bytes(content())

    return make


def _row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "what is 1 + 1 ?", "response": "so 2", "reward": 1.0, **changes}


def _other(**changes: Any) -> dict[str, Any]:
    return _row(**{"response": "so 3", "reward": 0.0, **changes})


def _link(name: str, target: str) -> Make:
    def make(folder: Path, canary: Path) -> None:
        (folder / name).symlink_to(target)

    return make


def _folder_link(folder: Path, canary: Path) -> None:
    """A folder of logs with a link to the canary's folder."""
    (folder / "logs").mkdir()
    (folder / "logs" / "a.jsonl").write_text(json.dumps(_row()) + "\n" + json.dumps(_other()))
    (folder / "logs" / "loop").symlink_to("..", target_is_directory=True)


def _output_link(folder: Path, canary: Path) -> None:
    """The output folder's parts are links to what is outside."""
    (folder / "out").mkdir()
    (folder / "out" / "groups").symlink_to(canary, target_is_directory=True)


def _yaml(text: str) -> Make:
    return _bytes("c.yaml", text.encode)


def _aliases(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines) + f"\ninputs: *a{levels - 1}\n"


_CONFIG = ["import", "--config", "c.yaml"]
_TRAIN = ["train", "--config", "c.yaml"]
_GZIP_BOMB = 512 * 2**20


def _gzip_bomb() -> bytes:
    return gzip.compress(b'{"prompt": "' + b"a" * _GZIP_BOMB + b'"}\n', 9)


def _bz2_bomb() -> bytes:
    return bz2.compress(b'{"prompt": "' + b"a" * (_GZIP_BOMB // 4) + b'"}\n')


def _where(text: str) -> list[str]:
    settings = {"model_name_or_path": "{model}", "dataset": "none", "output_dir": "run"}
    return ["train", *words_of(**settings, use_cpu=True, where=text)]


FILES: dict[str, tuple[Make, list[str]]] = {
    "log_fifo": (lambda folder, canary: os.mkfifo(folder / "l.jsonl"), _import("l.jsonl")),
    "log_loop": (_link("l.jsonl", "l.jsonl"), _import("l.jsonl")),
    "log_folder": (lambda folder, canary: (folder / "l.jsonl").mkdir(), _import("l.jsonl")),
    "log_socket": (_link("l.jsonl", "/dev/zero"), _import("l.jsonl")),
    "logs_loop": (_folder_link, _import("logs")),
    "out_link": (_output_link, _import("log.jsonl")),
    "log_gzip_bomb": (_bytes("l.jsonl.gz", _gzip_bomb), _import("l.jsonl.gz")),
    "log_bz2_bomb": (_bytes("l.jsonl.bz2", _bz2_bomb), _import("l.jsonl.bz2")),
    "log_nested": (
        _rows("l.jsonl", _row(), raw=b'{"prompt": ' + b"[" * 10**6 + b"]" * 10**6 + b"}\n"),
        _import("l.jsonl"),
    ),
    "log_digits": (
        _rows("l.jsonl", _row(), raw=b'{"prompt": "a", "reward": ' + b"9" * 10**6 + b"}\n"),
        _import("l.jsonl"),
    ),
    "log_line": (
        _bytes("l.jsonl", lambda: b'{"prompt": "' + b"a" * (200 * 2**20) + b'"}'),
        _import("l.jsonl"),
    ),
    "log_not_utf8": (_rows("l.jsonl", _row(), raw=b'{"prompt": "\xff\xfe"}\n'), _import("l.jsonl")),
    "log_surrogate": (
        _rows("l.jsonl", _row(), raw=b'{"prompt": "\\ud800", "response": "a", "reward": 1}\n'),
        _import("l.jsonl"),
    ),
    "log_control": (
        _rows("l.jsonl", _row(**{_ESCAPE: 1}), _other(reward=_ESCAPE)),
        _import("l.jsonl"),
    ),
    "log_sampler_control": (
        _rows("l.jsonl", _row(sampler=_ESCAPE), _other(sampler=_ESCAPE)),
        _import("l.jsonl", **{"columns.sampler": "sampler"}),
    ),
    "log_name_control": (
        _rows(f"{_ESCAPE.replace('/', '')}.jsonl", {"prompt": 1}),
        _import(f"{_ESCAPE}.jsonl"),
    ),
    "log_name_bytes": (_rows("l\udcff.jsonl", _row(), _other()), _import("l\udcff.jsonl")),
    "log_nan": (_rows("l.jsonl", _row(reward=float("nan")), _other()), _import("l.jsonl")),
    "log_infinity": (_rows("l.jsonl", _row(reward=1e999), _other()), _import("l.jsonl")),
    "log_nulls": (_bytes("l.jsonl", lambda: bytes(10**6)), _import("l.jsonl")),
    "log_parquet_text": (_bytes("l.parquet", lambda: b"PAR1 no PAR1"), _import("l.parquet")),
    "prompts_fifo": (lambda folder, canary: os.mkfifo(folder / "p.jsonl"), _sample("p.jsonl")),
    "prompts_loop": (_link("p.jsonl", "p.jsonl"), _sample("p.jsonl")),
    "prompts_nested": (
        _rows("p.jsonl", raw=b'{"prompt": ' + b"[" * 10**6 + b"]" * 10**6 + b"}\n"),
        _sample("p.jsonl"),
    ),
    "prompts_control": (_rows("p.jsonl", {"prompt": [_ESCAPE]}), _sample("p.jsonl")),
    "config_fifo": (lambda folder, canary: os.mkfifo(folder / "c.yaml"), _CONFIG),
    "config_loop": (_link("c.yaml", "c.yaml"), _CONFIG),
    "config_folder": (lambda folder, canary: (folder / "c.yaml").mkdir(), _CONFIG),
    "config_aliases": (_yaml(_aliases(9)), _CONFIG),
    "config_nested": (_yaml("inputs: " + "[" * 10**5 + "]" * 10**5), _CONFIG),
    "config_digits": (_yaml("shard_bytes: " + "9" * 10**6), _CONFIG),
    "config_object": (_yaml("inputs: !!python/object/apply:os.system ['touch owned']"), _CONFIG),
    "config_control": (_yaml(f'"{_ESCAPE!r}": 1'.replace("'", "")), _CONFIG),
    "config_nul": (_yaml("inputs: [a\0b]"), _CONFIG),
    "config_rate": (_yaml("learning_rate: -1\nmodel_name_or_path: none\ndataset: none"), _TRAIN),
    "where_ands": (lambda folder, canary: None, _where(" AND ".join(["group_size > 1"] * 1000))),
    "where_many": (lambda folder, canary: None, _where(" AND ".join(["group_size > 1"] * 10_000))),
    "where_deep": (lambda folder, canary: None, _where("(" * 3000 + "group_size > 1" + ")" * 3000)),
    "where_not": (lambda folder, canary: None, _where("NOT " * 20_000 + "group_size > 1")),
    "where_control": (lambda folder, canary: None, _where(_ESCAPE)),
    "where_file": (
        lambda folder, canary: None,
        _where("group_size > (SELECT 1 FROM read_csv('../outside/secret.txt'))"),
    ),
}
