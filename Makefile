SHELL = /bin/bash
PYTHON ?= python
export PYTHONHASHSEED = 0
export OMP_NUM_THREADS ?= 1

.PHONY: format lint type test test-all test-sb3 doc commit-checks tables clean

format:
	ruff check --fix .
	ruff format .

lint:
	ruff check .
	ruff format --check .
	codespell

type:
	mypy

test:
	$(PYTHON) -m pytest -q -n 2

# Includes the long runs that are marked `expensive`.
test-all:
	$(PYTHON) -m pytest -q -n 2 -m ""

# SB3's own tests on our algorithms; SB3_TESTS_DIR is the folder `tests` of the sources of the installed SB3.
test-sb3:
	@test -n "$(SB3_TESTS_DIR)" || { echo "Set SB3_TESTS_DIR to the folder tests of SB3's sources."; exit 1; }
	$(PYTHON) -m pytest -q -n 2 tests/test_sb3_conformity.py

doc:
	mkdocs build --strict

commit-checks: format type lint doc

# docs/benchmarks.md and its pictures, from benchmarks/results/*.json
tables:
	$(PYTHON) benchmarks/make_tables.py

clean:
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
