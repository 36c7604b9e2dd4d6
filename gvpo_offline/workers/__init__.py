"""Where a stage's tasks are done: in this process, in several, on a cluster, or in a job array.

`run.run_stage` is the one way in; `settings.WorkerSettings` says which engine. An engine does tasks
and yields their records; it knows nothing of what a stage does, and a stage knows nothing of it.
"""
