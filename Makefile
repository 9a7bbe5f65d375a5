PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REPOSITORY ?= model_repository
TEST_PROCESSES ?= 3
TEST_SEED ?= 1

.DEFAULT_GOAL := help
.PHONY: help install serve test explore test-gpu check format proto bench samples clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/pip:  # what venv makes last: one that was interrupted is gone on with
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Headrace needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serving: pyproject.toml | $(BIN)/pip
	@echo "Installing what serves and optimises the sample models into $(VENV), with PyTorch and OpenVINO: a minute or two."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[samples]'
	@touch $@

$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo "Installing what is developed and tested with into $(VENV), with TensorFlow and TensorRT: some minutes, 4 GB."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(VENV)/.serving $@

install: $(VENV)/.installed  ## make .venv with everything that the tests use (several gigabytes)

serve: $(VENV)/.serving  ## serve model_repository/ (REPOSITORY=... for another folder)
	@exec $(BIN)/headrace serve $(REPOSITORY)

# Real servers, killed workers and real clocks on two busy CPUs: a test that fails is run once more, and the summary lists it
# as RERUN. One that fails twice has failed. Servers are started by the hundred: what Python compiles of them is kept, also
# where the environment says otherwise. Three processes, as some tests wait for clocks and not for a CPU.
test: $(VENV)/.installed  ## run the whole test suite, in the same order each time (TEST_SEED=2 for another)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest tests -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --randomly-seed=$(TEST_SEED) --reruns 1 -raR

explore: $(VENV)/.installed  ## run the unit tests of made-up examples with ten times as many, new ones each time
	$(BIN)/python -m pytest tests/unit -m hypothesis --hypothesis-profile=explore

test-gpu: $(VENV)/.installed  ## run the tests that need an NVIDIA GPU; without one each says why it is skipped
	$(BIN)/python -m pytest tests/gpu

check: $(VENV)/.installed  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed  ## let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.installed  ## compile proto/ into server/headrace/wire/pb
	$(BIN)/python proto/compile.py

samples: $(VENV)/.installed  ## train the sample models again
	$(BIN)/python model_repository/train.py

bench: $(VENV)/.installed  ## drive a server under load beside ONNX Runtime in-process
	$(BIN)/python -m loadtests.run

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
