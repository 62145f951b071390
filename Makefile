# The D3-Net book. `make` alone lists what can be made.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
BIN := $(VENV)/bin
STAMP := $(VENV)/.d3-installed

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup reproduce test drill batch book colab rerun vouch notebooks links audit lint clean distclean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s  %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## create .venv and install the pinned packages (keeps a CPU-only torch that is already there)

# In a conda environment: make VENV=$CONDA_PREFIX ...
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is another; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV); the first time this takes minutes ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[batch,book,raw,dev]"
	@$(BIN)/python -c "import matplotlib.font_manager" # finds the fonts once, or the first page would say so
	@touch $@

reproduce: batch book ## everything: set up, run the smoke batch, build the book, show the comparison table
	@$(BIN)/d3lib status --budget smoke --table

batch: setup ## render rooms and run every smoke experiment that is not up to date
	@$(BIN)/d3lib reproduce --budget smoke

# A failed build forgets what it read, so that building again reports the same faults.
book: setup colab ## build the book into _build/html (warnings are errors)
	@$(BIN)/jupyter-book build book --config _config.yml --path-output . -q -W -n --keep-going \
		|| { rm -rf _build/.doctrees; exit 1; }
	@echo "The book: $(CURDIR)/_build/html/index.html"

colab: setup ## write the Colab notebooks in book/colab from the book's pages
	@$(BIN)/python book/_ext/colab.py

test: setup lint ## check style and run every test (about as many at once as there are cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

drill: setup ## kill, fill, flip and forge: what a run survives, as a table (LONG=1: thousands of trials, some minutes; RECORD=file.json)
	OMP_NUM_THREADS=1 D3LIB_LONG="$(LONG)" D3LIB_DRILLS="$(RECORD)" $(BIN)/python -m pytest -n $(JOBS) -m "drill or not drill" tests/drills

rerun: setup ## train ten of the book's records again, drawn at random, and compare (half an hour or more; RECORD=file.json)
	OMP_NUM_THREADS=1 D3LIB_RERUN_RECORD="$(RECORD)" $(BIN)/python -m pytest -s -rs -m study tests/drills/test_study.py -k again

vouch: setup ## begin records of older code again by that code and by today's, bit for bit the same? (about an hour; RECORD=file.json keeps the outcome and adds to what the file has)
	OMP_NUM_THREADS=1 D3LIB_RERUN_RECORD="$(RECORD)" $(BIN)/python -m pytest -s -rs -m study tests/drills/test_study.py -k older

notebooks: setup ## run every Colab notebook in an environment like Colab's, which it builds (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m colab tests/test_colab.py

links: setup ## ask every address that the book cites whether it still answers (needs the internet)
	@$(BIN)/jupyter-book build book --config _config.yml --path-output _build/links --builder linkcheck -q

audit: ## ask the advisory databases about every pinned package (needs the internet)
	@$(PYTHON) -m venv _build/audit && _build/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	@_build/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

lint: setup ## check style with ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean: ## remove the book, the smoke batch and caches (keeps .venv and the runs of other budgets)
	rm -rf _build runs/smoke runs/cache .pytest_cache .ruff_cache .hypothesis .snakemake
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf .venv *.egg-info
