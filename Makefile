# Two commands do everything on a fresh machine with Python 3.10 or newer and the package registry:
#   make demo   trains two concepts on the built-in model and composes them, into out/demo
#   make test   lint, types, tests, and the host tests where a ComfyUI is found
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements-dev.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed, this is ' + sys.version.split()[0] if sys.version_info < (3, 10) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: setup
	$(BIN)/python -m conceptsplit_core demo --out out/demo

test: setup
	$(BIN)/python tests/run.py

lint: setup
	$(BIN)/python tests/run.py --only lint

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf out .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
