# Two commands for a newcomer: `make quickstart` and `make test`. Both install what they need into
# $(VENV). Another interpreter: make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Tested versions, where there is a list for this interpreter; else the newest that fit.
PINS := requirements/py$(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])').txt
CONSTRAINTS := $(if $(wildcard $(PINS)),-c $(PINS),)

.PHONY: quickstart test lint lock clean

quickstart: $(VENV)/.run
	$(BIN)/python train.py --config=configs/quickstart.py --workdir=runs/quickstart

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.run: EXTRA =
$(VENV)/.test: EXTRA = [test]
$(VENV)/.dev: EXTRA = [dev]
$(VENV)/.run $(VENV)/.test $(VENV)/.dev: pyproject.toml $(wildcard $(PINS))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.$(EXTRA)'
	touch $@

# Writes the versions of a fresh resolution to requirements/, for review.
lock: clean
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[dev]'
	$(BIN)/python -m pip freeze --exclude vqcx_jax > $(PINS)

clean:
	rm -rf $(VENV) build *.egg-info
