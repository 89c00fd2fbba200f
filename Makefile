# Run `make` to see what there is to run. Everything lives in .venv; delete that folder to start over.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CHAPTERS := $(sort $(wildcard book/*.ipynb))
NBVAL := --nbval-lax --nbval-current-env --nbval-sanitize-with nbval_sanitize.cfg
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help book pdf test gpu colab export outputs repository clean
.DELETE_ON_ERROR:

help:
	@echo "make book                    build the book; the last line names the file to open"
	@echo "make pdf                     the book as one PDF; needs LaTeX (latexmk, xelatex)"
	@echo "make test                    run all tests"
	@echo "make gpu                     run every chapter and the GPU tests on a CUDA device"
	@echo "make colab                   run every chapter alone, in the versions that Colab has"
	@echo "make export                  write diffusionbook/*.py from the chapters"
	@echo "make outputs CHAPTER=book/04_noise_schedules.ipynb"
	@echo "                             export, run one chapter and store what it printed"
	@echo "make repository URL=https://github.com/you/fork"
	@echo "                             point every link of the book at your copy"
	@echo "make clean                   delete what was built (the environment .venv stays)"

# --- the environment ---------------------------------------------------------------------------
$(PY):
	@$(PYTHON) tools/check_python.py
	$(PYTHON) -m venv $(VENV)

$(VENV)/.book-is-installed: pyproject.toml constraints.txt | $(PY)
	@echo "Installing what the book needs into $(VENV) (once; this takes minutes)"
	$(PIP) install -q -c constraints.txt -e ".[book]"
	@touch $@

$(VENV)/.tests-are-installed: pyproject.toml constraints.txt | $(PY)
	@echo "Installing what the tests need into $(VENV) (once; this takes minutes)"
	$(PIP) install -q -c constraints.txt -e ".[test,book,train]"
	@# Only a tokenizer and some formulas are compared, which need none of their dependencies (torchvision among them).
	$(PIP) install -q -c constraints.txt --no-deps open_clip_torch torch-fidelity
	@touch $@ $(VENV)/.book-is-installed

# --- the book ----------------------------------------------------------------------------------
book: $(VENV)/.book-is-installed
	rm -rf _build
	@# side by side: the pages, and the networks that page "Paint" runs
	$(PY) tools/export_page.py _build/models & $(VENV)/bin/jupyter-book build . -W -n --keep-going && wait $$!
	mv _build/models _build/html/_static/paint/models
	@echo "The book is built. Open this file in a browser:"
	@echo "$(CURDIR)/_build/html/index.html"

pdf: $(VENV)/.book-is-installed
	@for tool in latexmk xelatex; do command -v $$tool >/dev/null || { echo "make pdf needs LaTeX, and $$tool is missing:" \
	  "sudo apt install latexmk texlive-xetex texlive-latex-extra texlive-fonts-extra fonts-freefont-otf"; exit 2; }; done
	$(VENV)/bin/jupyter-book build . --builder pdflatex
	@ls $(CURDIR)/_build/latex/*.pdf

# --- the tests ---------------------------------------------------------------------------------
test: $(VENV)/.tests-are-installed
	@# a process for each core, four at most, since a chapter may take a gigabyte; each with one thread, file by file
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile $(NBVAL) tests $(CHAPTERS)

gpu: $(VENV)/.tests-are-installed
	@$(PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu needs a CUDA device; PyTorch finds none.')"
	$(PY) -m pytest -m gpu tests
	$(PY) -m pytest $(NBVAL) $(CHAPTERS)

colab: $(VENV)/.tests-are-installed
	$(PY) tools/colab.py

# --- changing a chapter ------------------------------------------------------------------------
export: $(VENV)/.tests-are-installed
	$(VENV)/bin/nbdev-export

outputs: export
	@test -f "$(CHAPTER)" || { echo "Say which chapter: make outputs CHAPTER=book/04_noise_schedules.ipynb"; exit 2; }
	$(VENV)/bin/jupyter-execute --inplace "$(CHAPTER)"
	$(PY) tools/clean_notebooks.py "$(CHAPTER)"

repository:
	@$(PYTHON) tools/repository.py "$(URL)"

clean:
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
