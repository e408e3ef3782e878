# The two commands of the README, and their parts. Everything happens in .venv.
.DELETE_ON_ERROR:
.PHONY: demo test check lint types layers pytest slow full-size clean

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

demo: $(INSTALLED)
	$(BIN)/emocache demo --out demo

test: check pytest

check: lint types layers

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"emocache needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]}. Set PYTHON=...")'
	$(PYTHON) -m venv .venv
	@echo 'Installing into .venv: about 6 GB with the CUDA libraries of torch, some minutes.'
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,test]'
	touch $(INSTALLED)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	! grep -nE '^\s*import eval\b' --include='*.py' -r cache extract train eval tests benchmarks emocache.py

types: $(INSTALLED)
	$(BIN)/mypy

layers: $(INSTALLED)
	$(BIN)/lint-imports

pytest: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m 'not cluster and not slow and not slurm'
	$(BIN)/python -m pytest -n 2 -m 'cluster and not slow and not slurm'

# What takes longer: more rounds of the same faults, whole trainings, and a Slurm of its own.
slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m '(slow or slurm) and not cluster'
	$(BIN)/python -m pytest -n 2 -m '(slow or slurm) and cluster'

full-size: $(INSTALLED)
	$(BIN)/python benchmarks/full_size.py

clean:
	rm -rf .venv demo runs build *.egg-info
