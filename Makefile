SEED ?= 0
PROFILE ?= tiny
MODEL ?= tiny
STUDY = "$(PY)" -m kvlib.study
OF = --grid "notebooks/$(PROFILE).yml" --seed $(SEED) $(if $(GPUS),--jobs $(GPUS))
TRAIN_SEED ?= 7
SETUP := -I kvlib/bootstrap.py

# The active Python counts only if this folder's kvlib is installed in it.
ACTIVE := $(shell for p in python3 python; do $$p $(SETUP) --active 2>/dev/null && break; done)
PY := $(if $(ACTIVE),$(ACTIVE),.venv/bin/python)

# A python3.x on PATH may be a shim that fails, or lack the venv module, so each is tried.
SUITABLE := import ensurepip, sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])
PYTHON := $(shell for p in .venv/bin/python python3.12 python3.11 python3 python; do \
	$$p -I -c '$(SUITABLE)' 2>/dev/null && { echo $$p; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help env charts sweep plan status report verify compare test test-all test-ui test-faults test-slurm lint bench bench-count bench-gpu bench-kvpress-env tiny-model predictor gallery clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

env: ## set up the environment: the active one if kvlib is installed in it, else .venv
ifeq ($(ACTIVE),)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 with its venv module was found:" \
		"install one (Debian, Ubuntu: apt install python3-venv), name one (make PYTHON=...)" \
		"or use conda (conda env create -f env.yml)." >&2; exit 1; }
	@"$(PYTHON)" $(SETUP)
endif
	@echo "Python: $(PY)"

charts: env ## decode, grade, time and draw the four charts; SEED=1 for other noise
	@$(STUDY) charts --grid notebooks/tiny.yml --seed $(SEED)

sweep: env ## the same for any study: PROFILE=tiny, qwen-coder, smollm2, r1-qwen, r1-llama or your file; GPUS=4: cells at a time
	@$(STUDY) charts $(OF)

plan: env ## what a sweep takes (cells, hours, disk, GPU memory) and what is missing; starts nothing
	@$(STUDY) plan $(OF)

status: env ## how far a sweep is: done, running, failed, missing, time left; while it runs or not
	@$(STUDY) status $(OF)

report: env ## one HTML page of a sweep: charts, tables, provenance
	@$(STUDY) report $(OF)

verify: env ## checksums, completeness and duplicates of a sweep's records, or FOLDER=results/tiny
	@$(STUDY) verify $(OF) $(if $(FOLDER),--folder "$(FOLDER)")

compare: env ## compare all policies under equal terms: says how long first, continues when typed again
	@"$(PY)" -m kvlib.compare run --grid notebooks/compare.yml

bench: env ## measure speed, correctness first: MODEL=tiny, smollm2, qwen-coder, r1-qwen, r1-llama; options: BENCH="--out x.json"
	@"$(PY)" -m kvlib.bench --model "$(MODEL)" $(BENCH)

bench-gpu: env ## on a CUDA GPU: all kernels, every policy's graphs and R1-Qwen's shapes in one run of ten minutes, a record in results/bench
	@"$(PY)" -m kvlib.bench.gpu --folder results/bench

# kvpress pins an older transformers, so it gets an environment of its own.
bench-kvpress-env: env ## make the environment of the kvpress arms; then: make bench BENCH="--kvpress .kvpress-env/bin/python"
	@"$(PY)" -m venv .kvpress-env
	@.kvpress-env/bin/pip install torch==2.13.0 kvpress==0.5.5

test: env ## run the tests, all but the slow ones
	@"$(PY)" -m pytest -n logical

test-all: env ## run every test
	@"$(PY)" -m pytest -m "slow or not slow"

test-ui: env ## run two notebooks in JupyterLab in a headless Chromium; screenshots in figures/ui
	@"$(PY)" -m pytest -m "slow or not slow" -rs tests/ui

test-faults: env ## survival in full: a hundred kills over a running grid, and every other fault; half an hour
	@"$(PY)" -m pytest -m "slow or not slow" tests/faults tests/study/test_gpus.py tests/study/test_cell_command.py tests/test_record.py
	@"$(PY)" tests/faults/storm.py --kills 100

test-slurm: env ## the grid on a real one-node Slurm with two fake GPUs, a cell cancelled half-way; skips without Slurm
	@"$(PY)" tests/slurm/run.py

lint: env ## check style and formatting
	@"$(PY)" -m ruff check .
	@"$(PY)" -m ruff format --check .

bench-count: env ## count what a decode step at R1-Qwen's shapes moves and what the kernels take, without a GPU
	@"$(PY)" -m kvlib.kernels.resources
	@"$(PY)" -m kvlib.bench.count

# Keeping freed memory makes glibc's allocator, and so training, about a quarter faster.
tiny-model: env ## train the tiny reasoner from scratch into runs/, half an hour; TRAIN_SEED=8 for another
	@MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=536870912 "$(PY)" -m kvlib.train reasoner \
		--seed $(TRAIN_SEED) --out runs/tiny-model$(if $(filter 7,$(TRAIN_SEED)),,-s$(TRAIN_SEED))

predictor: env ## train a model's importance predictor: PROFILE=tiny, smollm2, r1-qwen, r1-llama
	@"$(PY)" -m kvlib.train predictor --profile "$(PROFILE)" $(if $(filter tiny,$(PROFILE)),--out kvlib/tiny/weights)

gallery: env ## execute the notebooks that changed and render what they look like into docs/gallery
	@"$(PY)" -m kvlib.charts.gallery

clean: ## remove caches and build leftovers; keeps .venv and everything measured
	@rm -rf build dist kvlib.egg-info .pytest_cache .ruff_cache .hypothesis
	@find kvlib kernels tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
