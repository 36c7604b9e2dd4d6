"""The report of a dataset of 100,000 groups: time, memory, size; and faults that the gate finds.

    make bench-report                          # a few minutes on two cores
    make bench-report ARGS="--groups 10000"

The dataset has groups of 8 responses of about 200 tokens, with rewards, a component, reference
log-probs of every token, and prompts as chat messages. It is written once, to runs/bench-report.
The report is made in a process of its own, whose peak memory (ru_maxrss) is reported.

Prints one JSON object as its last line:

- planted_faults, planted_faults_found: datasets with one fault each (tests/support/planted.py), and
  how many of them `validate` names; clean_findings: findings of the dataset without a fault.
- seconds_100k_groups: wall seconds of the report with its HTML, scaled to 100,000 groups if
  --groups is another number; cpu_seconds_100k_groups: CPU seconds of the same.
- gb_100k_groups: peak memory in GB of 10^9 bytes; html_mb: size of the HTML in MB of 10^6 bytes.

A figure is null where this version lacks the part that it is about.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "runs" / "bench-report"
GROUPS, RESPONSES, TOKENS = 100_000, 8, 200
SAMPLERS = ("older", "other", "hot", "person")
_SHARD = 20 * 256


def made_up_groups(first: int, count: int) -> Iterator[Any]:
    """Groups of a log: prompts of 40 to 120 tokens, responses of about TOKENS."""
    from gvpo_offline.group import Group

    rng = np.random.default_rng([7, first])
    lengths = np.clip(rng.gamma(4, TOKENS / 4, (count, RESPONSES)), 4, 4 * TOKENS).astype(int)
    prompts = rng.integers(40, 120, count)
    total = int(lengths.sum() + prompts.sum())
    ids = np.exp(rng.random(total) * np.log(50_000)).astype(np.int32)  # Zipf's law
    at = 0
    for row in range(count):
        number = first + row
        cuts = at + np.cumsum([prompts[row], *lengths[row]])
        prompt, *responses = np.split(ids[at : cuts[-1]], cuts[:-1] - at)
        at = int(cuts[-1])
        rewards = rng.choice([0.0, 0.25, 0.5, 1.0], RESPONSES)
        text = f"question {number} " + "about some words " * int(prompts[row] // 4)
        yield Group(
            group_id=f"group-{number:09d}",
            prompt_token_ids=prompt,
            response_token_ids=tuple(responses),
            samplers=tuple(SAMPLERS[i % 4] for i in range(RESPONSES)),
            truncated=tuple((lengths[row] == 4 * TOKENS).tolist()),
            rewards=rewards,
            components=np.stack([rewards, np.round(rng.random(RESPONSES), 2)]),
            ref_seq_logprobs=None,
            messages=json.dumps([{"role": "user", "content": text}]),
        )


def make_data(root: Path, n_groups: int) -> None:
    """Write the dataset with the store's own writer."""
    import itertools

    from gvpo_offline.hashing import sha256_text
    from gvpo_offline.store.arrow import reference_to_table
    from gvpo_offline.store.commit import TaskLog
    from gvpo_offline.store.manifest import Manifest, ReferenceFamily, RewardFamily
    from gvpo_offline.store.schema import REFERENCE_COLUMNS, arrow_schema
    from gvpo_offline.store.writer import publish, write_groups, write_sidecar

    log, names = TaskLog(root, "import"), ("right", "brief")
    records, references = [], []
    for first in range(0, n_groups, _SHARD):
        groups = list(made_up_groups(first, min(_SHARD, n_groups - first)))
        record = write_groups(
            root, "import", f"{first:09d}", groups, reward="reward", components=names
        )
        records.append(log.commit(record))
        (base,) = record.groups
        rng = np.random.default_rng([8, first])

        def tables(base: Any = base, groups: Any = groups, rng: Any = rng) -> Iterator[Any]:
            cuts = itertools.pairwise(np.cumsum([0, *base.row_groups]).tolist())
            for low, high in cuts:
                piece = groups[low:high]
                tokens = [
                    [-rng.exponential(1.2, n).astype(np.float32) for n in group.response_lengths]
                    for group in piece
                ]
                sums = [np.array([row.sum(dtype=np.float64) for row in own]) for own in tokens]
                yield reference_to_table([group.group_id for group in piece], sums, tokens)

        references.append(
            write_sidecar(
                root, "reference/x", f"{first:09d}", base, arrow_schema(REFERENCE_COLUMNS), tables()
            )
        )
    family = ReferenceFamily(
        fingerprint=sha256_text("made up"),
        model_name_or_path="made-up",
        weights_sha256=sha256_text("no weights"),
        model_class="MadeUp",
        dtype="float32",
        autocast_dtype=None,
        attn_implementation="eager",
        tokenizer_fingerprint=None,
        files=references,
    )
    rewards = [sidecar for record in records for sidecar in record.sidecars]
    manifest = Manifest(
        groups=[base for record in records for base in record.groups],
        rewards=[RewardFamily(name="reward", components=list(names), files=rewards)],
        references=[family],
    )
    publish(root, lambda _: manifest)


def describe(root: Path) -> dict[str, Any]:
    """Make the report and its HTML in this process, and measure it."""
    from gvpo_offline.report.dataset.build import dataset_report
    from gvpo_offline.report.page.html import render_page
    from gvpo_offline.report.settings import ReportSettings

    wall, cpu = time.perf_counter(), time.process_time()
    report = dataset_report(ReportSettings(dataset=str(root), show_progress=False))
    made = time.perf_counter() - wall
    html_mb = None
    with contextlib.suppress(NotImplementedError):
        html_mb = len(render_page(report.page).encode()) / 1e6
    return {
        "seconds": time.perf_counter() - wall,
        "seconds_without_html": made,
        "cpu_seconds": time.process_time() - cpu,
        "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "html_mb": html_mb,
        "json_mb": len(report.json_text().encode()) / 1e6,
        "groups_to_read": len(report.page.groups),
    }


def planted() -> dict[str, int | None]:
    """How many planted faults `validate` names, and what it finds in the clean dataset."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        faults = importlib.import_module("support.planted")
        gate = importlib.import_module("gvpo_offline.findings.gate")
    except ImportError:
        return dict.fromkeys(("planted_faults", "planted_faults_found", "clean_findings"))
    with tempfile.TemporaryDirectory() as folder:
        missed = [
            name
            for name, fault in faults.PLANTED.items()
            if fault.rule not in rules_of(gate, fault.build(Path(folder) / name))
        ]
        clean = rules_of(gate, faults.clean(Path(folder) / "clean"))
    print(f"faults that were not named: {', '.join(missed) or 'none'}")
    return {
        "planted_faults": len(faults.PLANTED),
        "planted_faults_found": len(faults.PLANTED) - len(missed),
        "clean_findings": len(clean),
    }


def rules_of(gate: Any, path: Path) -> list[str]:
    """The rules that the findings of a dataset name, one for each finding."""
    from gvpo_offline.errors import GVPOError

    try:
        return [finding.rule for finding in gate.check_dataset(str(path)).findings]
    except GVPOError as error:
        return [gate.error_finding(error).rule]


def main() -> None:
    """Write the data, describe it in another process, look for the planted faults."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", type=int, default=GROUPS)
    parser.add_argument("--child", type=Path, help="describe this dataset, and print the figures")
    given = parser.parse_args()
    if given.child:
        print(json.dumps(describe(given.child)))
        return
    root = FOLDER / f"data-{given.groups}"
    if not (root / "manifest-000001.json").exists():
        print(f"writing {given.groups:,} groups to {root}", flush=True)
        make_data(root, given.groups)
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(root)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr[-4000:])
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))
    scale = GROUPS / given.groups
    figures: dict[str, Any] = {
        **planted(),
        "seconds_100k_groups": round(scale * found["seconds"], 1),
        "cpu_seconds_100k_groups": round(scale * found["cpu_seconds"], 1),
        "gb_100k_groups": round(found["gb"], 2),
        "html_mb": None if found["html_mb"] is None else round(found["html_mb"], 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
