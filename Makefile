# make demo    set up everything in .venv and train with and without SFR on real images
# make test    set up everything in .venv and run the linters and all tests
# make bench   compare with other libraries
# make lint    the linters alone
# make format  put Python and C++ sources into the shape that the linters want
# make clean   remove .venv and all that was built
#
# PYTHON=python3.12 picks another interpreter, VENV=folder another place for the virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
FASHION_MNIST := /usr/share/datasets/fashion-mnist
CXX_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp')

define linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
endef

.PHONY: demo test bench lint format data clean install-train install-test install-bench
.DELETE_ON_ERROR:

demo: install-train data
	$(BIN)/python tools/demo.py

test: install-test
	$(linters)
	$(BIN)/pytest

bench: install-bench
	$(BIN)/python -m benchmarks --suite quick --out benchmarks/out

lint: install-test
	$(linters)

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
install-bench: EXTRAS = bench
install-train install-test install-bench: $(VENV)/.made
	@echo "Installing sfr_ext[$(EXTRAS)] into $(VENV): a minute or two the first time, seconds after that"
	@$(PIP) setuptools pybind11 ninja
	@$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'

# Debian and Ubuntu carry Fashion-MNIST as a package. Where it cannot be installed, the demo says what it does instead.
data:
	@[ -d $(FASHION_MNIST) ] || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && { \
	  echo "Installing the Debian package dataset-fashion-mnist"; \
	  apt-get install -qq -y dataset-fashion-mnist || \
	  { apt-get update -qq && apt-get install -qq -y dataset-fashion-mnist; }; } >/dev/null 2>&1; } || true

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache sfr_ext/build_config.json
	find sfr_ext tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f sfr_ext/_C*.so
