"""CPU time of `validate`'s checks by length of responses: the light ones must not grow with it.

`make bench-validate`; some minutes and 1 GB of disk. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from gvpo_offline.findings.gate import check_dataset
from gvpo_offline.group import Group
from gvpo_offline.hashing import sha256_text
from gvpo_offline.store.arrow import reference_to_table
from gvpo_offline.store.manifest import Manifest, ReferenceFamily, RewardFamily, TokenizerInfo
from gvpo_offline.store.schema import REFERENCE_COLUMNS, arrow_schema
from gvpo_offline.store.writer import publish, write_groups, write_sidecar

K, VOCAB_SIZE, END, ROWS = 4, 50_000, 2, 100
TOKENIZER = TokenizerInfo(name_or_path="none", fingerprint=sha256_text("t"), vocab_size=VOCAB_SIZE)


def groups(n_groups: int, length: int) -> Iterator[Group]:
    """Groups of K responses of random ids, each of `length` tokens."""
    rng = np.random.default_rng(0)
    for number in range(n_groups):
        responses = rng.integers(3, VOCAB_SIZE, (K, length), dtype=np.int32)
        responses[:, -1] = END
        yield Group(
            group_id=f"group-{number:06d}",
            prompt_token_ids=rng.integers(3, VOCAB_SIZE, 50, dtype=np.int32),
            response_token_ids=tuple(responses),
            samplers=("one", "two", "one", "two"),
            truncated=(False,) * K,
            rewards=rng.permutation([0.0, 0.25, 0.5, 1.0]),
        )


def build(root: Path, n_groups: int, length: int) -> None:
    """A dataset with a reward and a reference, whose tokens have log-probs."""
    record = write_groups(
        root, "import", "0", groups(n_groups, length), reward="reward", rows_per_row_group=ROWS
    )
    (base,) = record.groups
    rng = np.random.default_rng(1)

    def scores(start: int) -> pa.Table:
        ids = [f"group-{number:06d}" for number in range(start, min(start + ROWS, n_groups))]
        tokens = -rng.exponential(1.0, (len(ids), K, length)).astype(np.float32)
        sums = tokens.sum(-1, dtype=np.float64)
        return reference_to_table(ids, list(sums), [list(row) for row in tokens])

    tables = (scores(start) for start in range(0, n_groups, ROWS))
    schema = arrow_schema(REFERENCE_COLUMNS)
    scored = write_sidecar(root, "reference/r", "0", base, schema, tables)
    reference = ReferenceFamily(
        fingerprint=sha256_text("r"),
        model_name_or_path="none",
        weights_sha256=sha256_text("w"),
        model_class="None",
        dtype="float32",
        autocast_dtype=None,
        attn_implementation="eager",
        tokenizer_fingerprint=TOKENIZER.fingerprint,
        files=[scored],
    )
    manifest = Manifest(
        tokenizer=TOKENIZER,
        groups=[base],
        rewards=[RewardFamily(name="reward", files=record.sidecars)],
        references=[reference],
    )
    publish(root, lambda newest: manifest)


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """The least CPU time of some repetitions, in seconds, over all threads of the process."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    """Measure both checks at both lengths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=2000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 5000])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    result: dict[str, float] = {"groups": options.groups}
    for length in options.lengths:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            build(root, options.groups, length)
            light = functools.partial(check_dataset, root, light=True)
            findings = light().findings
            assert not findings, findings
            result[f"light_cpu_seconds_{length}"] = cpu_seconds(light, options.repeats)
            result[f"full_cpu_seconds_{length}"] = cpu_seconds(
                functools.partial(check_dataset, root), 1
            )
        print(json.dumps(result), flush=True)
    shortest, longest = min(options.lengths), max(options.lengths)
    for kind in ("light", "full"):
        times = [result[f"{kind}_cpu_seconds_{length}"] for length in (shortest, longest)]
        result[f"{kind}_growth"] = times[1] / times[0]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
