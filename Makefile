# Targets for people. `make quick ARGS="--num-iter 5"` hands options on to launch.py.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.installed-dev
DOCS_INSTALLED := $(VENV)/.installed-docs
ARGS ?=
# pip compiles on one core, compileall on all of them. What no Python can compile is left alone.
INSTALL := $(BIN)/python -m pip install --no-compile -c constraints.txt
# All but torch: each index has builds of its own, so that no list of hashes fits every machine.
LOCKED := $(BIN)/python -m pip install --no-compile --no-deps --require-hashes
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true

.PHONY: setup dev quick full faults test lint docs ui clean

setup: $(INSTALLED)

dev: $(DEV_INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt requirements.lock
	@test -e $@ || rm -rf $(VENV)  # what a failed attempt left
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) -r requirements.lock
	$(INSTALL) --no-build-isolation -e '.[quick,png,test]'
	$(COMPILE)
	@touch $@

$(DEV_INSTALLED): $(INSTALLED) requirements-dev.lock
	$(LOCKED) -r requirements-dev.lock
	$(INSTALL) --no-build-isolation -e '.[dev]'
	$(COMPILE)
	@touch $@

$(DOCS_INSTALLED): $(DEV_INSTALLED) requirements-docs.lock
	$(LOCKED) -r requirements-docs.lock
	$(COMPILE)
	@touch $@

# A mode that fails (exit code 1) is part of the comparison; anything worse ends here.
quick full: setup
	@group=$@-$$(date +%Y%m%d-%H%M%S); \
	$(BIN)/python launch.py $@ --group $$group $(ARGS) || [ $$? -eq 1 ] || exit 1; \
	$(BIN)/python compare.py $$group

# Ends with 1 if a fault is missed or a healthy mode raises an alarm; the page is written anyway.
faults: setup
	$(BIN)/python launch.py faults --output docs/detection.md $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/, in site/. Once the tools are installed it is built without a network.
docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --strict --quiet --site-dir site

ui: setup
	$(BIN)/python launch.py ui $(ARGS)

# Leaves results/, mlflow.db and mlartifacts/ alone: they are yours.
clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
