"""Workers: a stage's tasks run in this process, in several, on a Ray cluster, or in a job array.

`run.run_stage` is the entry point, and `settings.WorkerSettings` chooses the backend. A backend
runs tasks and yields their records; backends and stages know nothing of each other.
"""
