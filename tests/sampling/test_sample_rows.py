"""What was sampled, as rows of an import."""

from __future__ import annotations

from pathlib import Path

from support.importing import write_jsonl
from support.sampling import FaultServer, config, remote

from gvpo_offline.sampling.gather import SampledRows
from gvpo_offline.sampling.run import _Run, run_sample

NOTE = 20_000


def test_a_row_is_as_large_as_its_prompt(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """4 prompts with 20,000 characters beside each, 3 responses: 12 rows of more than that. The
    import cuts its buckets, and so bounds its memory, by this number.
    """
    rows = [{"prompt": f"What is {i}?", "note": str(i) * NOTE} for i in range(4)]
    inputs = str(write_jsonl(tmp_path / "prompts.jsonl", rows))
    server = FaultServer()
    try:
        run = config(tmp_path, tiny_tokenizer_dir, {"s": remote(server.url)}, inputs=inputs)
        assert run_sample(run).manifest is not None
        done = _Run(run, tmp_path / "data")
        sampled = SampledRows(done.prompts, done.stages["s"].log, done.settings["s"])
    finally:
        server.close()
    assert 12 * NOTE < sampled.text_bytes < 12 * (NOTE + 1_000)
