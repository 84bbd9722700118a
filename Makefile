# `make demo` and `make test` need only Linux, make, Python 3.11 or later, and a package index.

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install folder demo test test-all check bench soak format clean

help:
	@echo "make demo      train, track and register a captioner on the embedded scenes"
	@echo "make test      the default tests, about three minutes"
	@echo "make test-all  real data, real services and long runs too"
	@echo "make bench     speed and memory against rivals and the arithmetic; tells what fell behind"
	@echo "make soak      more cases of the slow tests, then kills and faults at random moments; more than an hour"
	@echo "make check     format, lint, types, layers"
	@echo "make clean     delete .venv and tool caches; runs, models and features stay"

install: .venv/installed

# MLflow cannot open a database where a % stands in the path that it is installed in, and .venv is in this folder.
folder:
	@case "$$PWD" in *%*) echo "$$PWD: MLflow cannot work where a folder's name holds %; rename the folder" >&2; exit 2;; esac

# The pins of conda.yaml, the one place that holds versions.
.venv/installed: conda.yaml | folder
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "capexp needs Python 3.11 or later; make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	sed -n 's/^      - \(.*==.*\)$$/\1/p' conda.yaml > .venv/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement .venv/requirements.txt
	touch $@

# The tools that test and check, beside the same pins.
.venv/installed-test: .venv/installed pyproject.toml
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"], sep="\n")' > .venv/requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement .venv/requirements.txt --requirement .venv/requirements-test.txt
	touch $@

# Threads that spin for a moment before they sleep: a third faster for a small model that has the cores to itself.
# The store is MLflow's default one, named: for its default MLflow leaves an empty folder of the percent-encoded name
# beside one whose name has a blank.
demo: .venv/installed
	MLFLOW_TRACKING_URI="$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" \
	GOMP_SPINCOUNT=10000 MLFLOW_EXPERIMENT_NAME=scenes mlflow run . --env-manager local
	@echo 'These commands are found with:  export PATH="$$PWD/.venv/bin:$$PATH"'

# More tests at a time than two cores can run: some wait for a disk, a server or a process, above all slow ones. Python
# keeps what pytest has compiled, whatever the environment says.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= python -m pytest --dist worksteal --numprocesses $(AT_ONCE)
AT_ONCE = 4
test: AT_ONCE = 3

test: .venv/installed-test
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m "slow and not soak"

check: .venv/installed-test
	ruff format --check .
	ruff check .
	mypy
	lint-imports --no-logo

# A quarter of an hour on two cores. BENCHMARKS.md says what its figures were on which machine.
bench: .venv/installed
	for one in training extraction decoding search; do python experiments/benchmarks/bench_$$one.py || exit 1; done

# More than an hour on two cores; docs/reliability.md says what was counted.
soak: .venv/installed-test
	$(PYTEST) -m soak
	for one in kills trials service; do python experiments/soak/soak_$$one.py || exit 1; done

format: .venv/installed-test
	ruff format .
	ruff check --fix .

clean:
	rm -rf .venv .venv-keras .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist *.egg-info
