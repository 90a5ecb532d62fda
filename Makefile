# make demo    the whole method on the embedded model, from a fresh clone: environment, run, report
# make test    environment with the developers' tools, then the tests
# make check   style and types
# make docs    the documentation as a site, in site/
#
# Needs Python 3.11 or newer and git. torch is its CPU build; for another one, install it into .venv first, or name an
# index: make demo TORCH_INDEX=https://download.pytorch.org/whl/cu130

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: demo test check docs clean

demo: .venv/installed
	$(BIN)/isic demo

test: .venv/installed-dev
	$(BIN)/python -m pytest

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

clean:
	rm -rf .venv .venv-docs site .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "isic_ray needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

# The CPU build of torch first, from wherever pip is set up to look, else from TORCH_INDEX; so that the installation
# after it finds torch in place and fetches no gigabytes of CUDA libraries.
.venv/torch: constraints.txt | $(BIN)/python
	@echo 'Installing into .venv; the first time takes some minutes.'
	@$(PIP) show --quiet torch 2>/dev/null \
	  || $(PIP) install --quiet --no-deps 'torch==$(TORCH)+cpu' 2>/dev/null \
	  || $(PIP) install --quiet --no-deps --index-url '$(TORCH_INDEX)' 'torch==$(TORCH)'
	touch $@

.venv/installed: pyproject.toml constraints.txt .venv/torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt .venv/torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/installed

# The site needs neither torch nor Ray, so the extra is installed without the package.
.venv-docs/installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet -r .venv-docs/requirements.txt
	touch $@
