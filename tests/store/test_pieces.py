"""Files of map tasks: each part has its rows, in the order in which they were added."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gvpo_offline.errors import IntegrityError
from gvpo_offline.store import pieces
from gvpo_offline.store.pieces import PieceWriter, read_pieces

SCHEMA = pa.schema([("key", pa.uint64()), ("row", pa.int64())])


@pytest.mark.parametrize("n_parts", [1, 8])
def test_rows_of_several_flushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_parts: int
) -> None:
    """1,000 rows of 16 bytes, 100 at a time, a flush above 3,000 bytes: after every second table,
    five flushes. The part of a key is its highest 3 bits; part 5 has no rows.
    """
    monkeypatch.setattr(pieces, "_LEAST_BUFFER", 3000)
    monkeypatch.setattr(pieces, "_PIECE_BYTES", 1)
    keys = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    keys[keys >> np.uint64(61) == 5] = 0
    writer = PieceWriter(tmp_path / "rows" / "0.rows", SCHEMA, n_parts)
    for start in range(0, 1000, 100):
        own = slice(start, start + 100)
        writer.add(pa.table([keys[own], np.arange(start, start + 100)], schema=SCHEMA))
    found = writer.finish()
    writer.close()
    path = tmp_path / "rows" / "0.rows"
    assert list(path.parent.iterdir()) == [path]
    assert found == ([0] if n_parts == 1 else [0, 1, 2, 3, 4, 6, 7])
    parts = keys >> np.uint64(61) if n_parts == 8 else np.zeros(1000, np.uint64)
    for part in range(n_parts):
        tables = list(read_pieces(path, part))
        assert len(tables) == (0 if part not in found else 5)
        rows = [row for table in tables for row in table.column("row").to_pylist()]
        assert rows == np.flatnonzero(parts == part).tolist()


def test_a_file_without_rows_and_one_that_is_not_finished(tmp_path: Path) -> None:
    writer = PieceWriter(tmp_path / "0.rows", SCHEMA, 4)
    assert writer.finish() == []
    assert list(read_pieces(tmp_path / "0.rows", 3)) == []
    left = PieceWriter(tmp_path / "1.rows", SCHEMA, 4)
    left.close()
    assert [path.name for path in tmp_path.iterdir()] == ["0.rows"]
    with pytest.raises(IntegrityError, match="stay complete"):
        list(read_pieces(tmp_path / "1.rows", 0))
