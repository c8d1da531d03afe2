# make demo | test | lint | bench. Each installs what it needs into .venv, once.
# All but demo also run in an existing environment: make test PYTHON=/path/to/python NO_INSTALL=1
PYTHON ?= python3

demo: .venv/installed-demo
ifdef NO_INSTALL
RUN := $(PYTHON)
else
RUN := .venv/bin/python
test: .venv/installed-test
bench: .venv/installed-bench
lint: .venv/installed-lint
endif

.PHONY: demo test lint bench
.DELETE_ON_ERROR:

demo:
	.venv/bin/mistral-kernels generate --prompt "whistle:"
	.venv/bin/mistral-kernels verify

# Every worker has a torch pool of its own, and threads beyond the cores spin against each other.
# Files come in the order of tests/conftest.py, the longest first: none is left alone at the end.
WORKERS = -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test:
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(WORKERS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m pytest $(WORKERS) -m interpreter

lint:
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# A folder of results a machine: make bench MACHINE=h200 on a GPU.
MACHINE ?= cpu

bench:
	$(RUN) -m benchmarks.run --restart --out benchmarks/results/$(MACHINE)
	$(RUN) -m benchmarks.report

# Python files are used where they are (an editable install); everything compiled reinstalls.
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml constraints.txt
INSTALL = .venv/bin/python -m pip install -q -c constraints.txt

.venv/installed-demo: EXTRA =
.venv/installed-test: EXTRA = [test]
.venv/installed-bench: EXTRA = [bench,hf]
.venv/installed-demo .venv/installed-test .venv/installed-bench: $(SOURCES) | .venv
	$(INSTALL) -e ".$(EXTRA)"
	touch $@

.venv/installed-lint: constraints.txt | .venv
	$(INSTALL) ruff clang-format
	touch $@

.venv:
	$(PYTHON) -m venv $@
