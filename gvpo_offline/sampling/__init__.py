"""Sampling: prompts to k responses each, from one or several named samplers, into one dataset.

    inputs -> prompts/ -> samples/<sampler>/ -> groups

`prompts` normalises the inputs into one file, a row group a task. `stage` has a sampler answer one
task at a time and logs every response, or why there is none, in `log`. What failed is a gap, which
the next run fills. Once no gap is left, `gather` hands the log to the importer, which makes groups
of it as of any other log. Samplers: `local` (transformers, by `decode`), `vllm`, `server` (an
OpenAI-compatible one), `batch` (OpenAI batch files).
"""
