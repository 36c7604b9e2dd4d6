"""Sampling: k responses to each prompt, from one or several named samplers, into one dataset.

    inputs -> prompts/ -> samples/<sampler>/ -> groups

`prompts` normalises the inputs into one file with a row group for each task. `stage` has a sampler
respond to one task at a time and logs each response, or the cause of its failure, in `log`. The
next run repeats failed responses alone. Once none is missing, `gather` passes the log to the
importer, which makes groups of it as of any other log. Samplers: `local` (transformers, with
`decode`), `vllm`, `server` (an OpenAI-compatible one), `batch` (OpenAI batch files).
"""
