# make demo    set up everything in .venv and train with and without SFR on real images
# make test    set up everything in .venv and run the linters and all tests (25 minutes on two cores)
# make quick   the linters and the tests that are quick (2 minutes on two cores)
# make docs    the site, build/docs/html/index.html: every example is run, and a warning is an error (minutes)
# make wheels  a wheel for each Python that is installed here, repaired and checked (tools/wheels.py; minutes)
# make oldest  the core tests with the oldest torch and numpy, in .venv-oldest (PYTHON=python3.10; downloads 3 GB; 10 minutes)
# make bench   install other libraries, compare with them, write tables and plots to benchmarks/out (12 minutes)
# make lint    the linters alone
# make mutate-cuda  delete the CUDA kernels' barriers and guards one by one: do the tests notice? (an hour)
# make fuzz    other random inputs with every seed, for an hour (FUZZ_SECONDS=3600)
# make gpu-model  what a GPU would make of the CUDA kernels: budgets, and the tables of docs/gpu-model.md (minutes; no GPU)
# make format  put Python and C++ sources into the shape that the linters want
# make clean   remove .venv and all that was built
#
# PYTHON=python3.12 picks another interpreter, VENV=folder another place for the virtual environment, SFR_EXT_CUDA=1
# builds the CUDA kernels too.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
FASHION_MNIST := /usr/share/datasets/fashion-mnist
CXX_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# `make test` takes its tests' files two at a time, where there are two cores.
PROCESSES ?= 2

# Without CUDA kernels unless asked for, so that it stays quick; set but empty, they are built where an nvcc works.
# `make test` compiles them for two architectures in any case, with nvcc from PyPI (100 MB) where the machine has none.
SFR_EXT_CUDA ?= 0
export SFR_EXT_CUDA
WITH_NVCC = $(SFR_EXT_CUDA)

define linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
endef

# Threads that wait asleep: on a busy machine, spinning ones make tests several times as slow. Not for bench.
demo test quick oldest docs: export OMP_WAIT_POLICY ?= passive

.PHONY: demo test quick oldest docs wheels bench lint fuzz mutate-cuda format data clean \
  install-train install-test install-quick install-docs install-bench
.DELETE_ON_ERROR:

demo: install-train data
	$(BIN)/python tools/demo.py

test: install-test
	@echo "The linters, then all tests: 25 minutes on two cores, half an hour on busy ones. make quick takes 2 minutes."
	$(linters)
	$(BIN)/pytest --numprocesses auto --maxprocesses $(PROCESSES) --dist loadgroup --no-loadscope-reorder

# What a change of Python or of the CPU's kernels breaks first. Neither nvcc nor the emulator is needed.
QUICK := build_docs channels contracts docs emd_values errors first_minutes linear_assignment older_versions reference \
  smoothing snippets threads_of_python weights
quick: install-quick
	$(linters)
	$(BIN)/pytest -q -m "not slow" $(wildcard $(QUICK:%=tests/test_%.py))

# What torch 2.4 itself cannot do (docs/limits.md) is left out by name.
OLDEST := channels contracts cost_matrix counters emd_values errors func gradients hooks linear_assignment operators plan \
  regularizer smoothing snippets threads_of_python versions weights
OLDEST_CANNOT := not test_export and not test_a_copy_that_a_graph_does_not_need \
  and not (test_versions and test_compiled)
oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet torch==2.4.1 numpy==1.24.4 \
	  scipy pytest hypothesis tomli "setuptools>=77" pybind11 ninja
	.venv-oldest/bin/pip install --quiet --no-build-isolation --no-deps --editable .
	.venv-oldest/bin/pytest -q -m "not slow" -k "$(OLDEST_CANNOT)" $(OLDEST:%=tests/test_%.py)

docs: install-docs
	$(BIN)/python tools/build_docs.py

wheels:
	$(PYTHON) tools/wheels.py

bench: install-bench
	$(BIN)/python -m benchmarks --suite quick --out benchmarks/out

lint: install-test
	$(linters)

gpu-model: install-test
	PYTHONPATH=tools:tools/backend $(BIN)/python -m gpu_model docs

mutate-cuda: install-test
	$(BIN)/python tools/mutate_cuda.py

fuzz: install-test
	$(BIN)/python tools/fuzz.py

format: install-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# pyvenv.cfg is written before pip is there, so the stamp is a file of our own.
$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on PATH; name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) tools/check_machine.py
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Editable, so that what runs from this folder is what was built; without build isolation, so that the constraints
# hold for the build's own requirements and a second build compiles only what changed.
install-train: EXTRAS = train
install-test: EXTRAS = train,test,dev
install-test: WITH_NVCC = 1
install-quick: EXTRAS = train,test,dev
install-docs: EXTRAS = train,docs
install-bench: EXTRAS = bench
install-train install-test install-quick install-docs install-bench: $(VENV)/.made
	@echo "Installing sfr_ext[$(EXTRAS)] into $(VENV): a minute or two the first time, seconds after that"
	@$(PIP) setuptools pybind11 ninja $$(SFR_EXT_CUDA=$(WITH_NVCC) $(BIN)/python tools/backend/native_build.py)
	@$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'

# Debian and Ubuntu carry Fashion-MNIST as a package. Where it cannot be installed, the demo says what it does instead.
data:
	@[ -d $(FASHION_MNIST) ] || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && { \
	  echo "Installing the Debian package dataset-fashion-mnist"; \
	  apt-get install -qq -y dataset-fashion-mnist || \
	  { apt-get update -qq && apt-get install -qq -y dataset-fashion-mnist; }; } >/dev/null 2>&1; } || true

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache sfr_ext/build_config.json
	find sfr_ext tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f sfr_ext/_C*.so
