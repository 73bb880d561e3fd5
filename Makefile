# Each target makes .venv with plain venv and pip if it is missing, and is quick when it is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: scan test lint clean

scan: $(VENV)/.runtime  ## draw the default landscape; options go in ARGS="--ndim 2 …"
	$(BIN)/python experiments/scan.py $(ARGS)

# Each process takes whole files, whose tests share fixtures and compiled programs, in the order of tests/conftest.py.
test: ARGS ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
test: export PYTHONDONTWRITEBYTECODE =  # empty: tests start many processes, each of which would compile the package
test: $(VENV)/.test  ## run the tests; pytest's options go in ARGS, and are then all
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # the site, into build/site; --quiet would not count warnings

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("jaxscape needs Python 3.11 or newer; name one: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
# Some distributions split ensurepip off into a package of its own; the system's pip can then fill the environment.
	@echo "setting up $(VENV) …"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check pip; }
	@$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	@$(PIP) --editable '.[test]'
	@touch $@
