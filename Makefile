# make scan: the main job. make test: everything that must hold. make bench: every benchmark. make clean.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written when the installation is complete, so that a second call installs nothing; older than what it depends on, it is redone.
INSTALLED := $(VENV)/.installed
# Processes that run the tests side by side.
WORKERS ?= 2

.PHONY: scan test bench clean install

scan: $(INSTALLED)
	$(BIN)/headwise scan --out scan

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS)

bench: $(INSTALLED)
	@set -e; for name in $$($(BIN)/python -c "from headwise import registry; print(*registry.names('benchmark'))"); do \
		echo "== $$name"; $(BIN)/headwise bench $$name; done

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# What was made here, except the environment: that goes with rm -rf .venv
clean:
	rm -rf scan build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests training -name __pycache__ -type d -exec rm -rf {} +
