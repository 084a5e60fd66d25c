# Two targets do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow check bench tables docs clean

demo: $(READY)
	rm -rf demo
	$(BIN)/countermark demo --out demo

test: $(READY)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

test-slow: $(READY)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m slow

check: $(READY)
	$(BIN)/ruff format --check src tests tools examples
	$(BIN)/ruff check src tests tools examples
	$(BIN)/mypy
	$(BIN)/deptry src
	$(BIN)/python tools/render_results.py --check
	$(BIN)/pytest -q tests/unit/test_architecture.py

bench: $(READY)
	$(BIN)/python -m countermark_lab speed --write docs/performance.md

tables: $(READY)
	$(BIN)/python tools/render_results.py

docs: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/zensical build --strict

# The virtual environment is made anew only when what it is made from changes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) tools/preflight.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo site build dist
