# Every target is described by the text behind its ##; `make` prints them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# 0: nothing native is built, attention runs in torch.
ELBOWROOM_NATIVE ?= 1
# What `make demo` hands to `elbowroom run`.
DEMO_ARGS ?= --file examples/workshop.txt --memory 96MiB \
	"What is the code of yqrxpu?" "What is the code of usqizm?" "What is the code of vrengz?"
BENCH_ARGS ?= --json
PYTEST_ARGS ?=
# Tests that measure the machine, or processes: nothing runs beside them.
ALONE := tests/unit/test_native_peaks.py
MODULE := $(VENV)/.native-$(ELBOWROOM_NATIVE)

.DEFAULT_GOAL := help
.PHONY: help install demo test check format bench clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed $(MODULE) ## make .venv with Elbowroom (editable), its native module and the development tools

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Elbowroom needs Python 3.11 or later: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# No build isolation: the build tools are pinned as well.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) scikit-build-core nanobind cmake ninja
	ELBOWROOM_NATIVE=0 $(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

$(VENV)/.native-1: $(VENV)/.installed CMakeLists.txt $(wildcard native/*)
	$(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
		-DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DCMAKE_BUILD_TYPE=Release -DELBOWROOM_IN_PLACE=ON --log-level=WARNING
	$(BIN)/cmake --build build/native
	@rm -f $(VENV)/.native-* && touch $@

$(VENV)/.native-0: $(VENV)/.installed
	rm -f src/elbowroom/_native*.so
	@rm -f $(VENV)/.native-* && touch $@

demo: install ## run the demonstration: a model inside a small budget
	$(BIN)/elbowroom run $(DEMO_ARGS)

# Of the tests alone: 1 GB. Where there is no such package, its tests are skipped.
$(VENV)/.installed-triton: $(VENV)/.installed
	@[ "$$(uname -s)" != Linux ] || $(PIP_INSTALL) triton
	@touch $@

test: check $(VENV)/.installed-triton ## check the source and run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(addprefix --ignore=,$(ALONE)) tests/unit tests/cross $(PYTEST_ARGS)
	$(BIN)/python -m pytest $(ALONE) tests/e2e $(PYTEST_ARGS)

check: install ## lint, format check and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## rewrite the source in the house format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

$(VENV)/.installed-bench: $(VENV)/.installed
	ELBOWROOM_NATIVE=0 $(PIP_INSTALL) --no-build-isolation --editable '.[dev,bench]'
	@touch $@

bench: install $(VENV)/.installed-bench ## install the rivals and measure against them
	$(BIN)/elbowroom bench $(BENCH_ARGS)

clean: ## remove builds and caches; keep .venv
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/elbowroom/_native*.so
	rm -f $(VENV)/.installed* $(VENV)/.native-*
