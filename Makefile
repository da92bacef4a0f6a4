# Every command sets up .venv first, once, with the versions of tests/constraints.txt; `make help` lists them.
# Another interpreter: make demo PYTHON=python3.12. Options of the program behind a command: make notebooks ARGS="...".

FITS = import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))
PYTHONS = $(foreach name,python3 python3.14 python3.13 python3.12 python3.11 python3.10,$(shell $(name) -c '$(FITS)' 2>/dev/null && echo $(name)))
PYTHON ?= $(firstword $(PYTHONS) python3)
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PINS := tests/constraints.txt
NOTEBOOKS ?= notebooks
# Tests run side by side, a file at a time, in as many processes as there are cores, each with one thread: the small
# models gain nothing from more, and lose much where anything else runs.
WORKERS ?= -n logical --maxprocesses 8
test rehearse: export OMP_NUM_THREADS ?= 1
test rehearse: export MKL_NUM_THREADS ?= 1

# Notebook 00, with the whole checkout below it so that links to data/ lead somewhere; no news and no looking for updates.
# What a cell uploads is one message of Lab's websocket, which by itself drops more than 10 MB: two photographs.
LAB := --LabApp.default_url=/lab/tree/notebooks/00_the_result_first.ipynb --LabApp.news_url=None \
	--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
	--ServerApp.tornado_settings='{"websocket_max_message_size": 1000000000}'
ROOT := $(if $(filter 0,$(shell id -u 2>/dev/null)),--allow-root)

# `make colab` takes Colab's versions. Its torch with CUDA is some gigabytes, and for Linux that is what the index has
# under that number; make colab TORCH=2.13.0 names another, of which a CPU build may be at hand.
COLAB := build/colab
VERSIONS := tests/colab-versions.txt
TORCH ?= $(shell sed -n 's/^torch==//p' $(VERSIONS))

.DEFAULT_GOAL := help
.PHONY: help demo test rehearse lab notebooks gpu bench pretrain results colab size setup clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: $(READY)  ## personalize Toybox on a shipped concept, write one picture, print the scores (1 minute)
	$(BIN)/python -m data.make.demo $(ARGS)

test: $(READY)  ## style, types, every test, and every notebook against its saved outputs
	@failed=; run() { echo "$$*"; "$$@" || failed="$$failed [$$*]"; }; \
	run $(BIN)/ruff check .; \
	run $(BIN)/ruff format --check .; \
	run $(BIN)/mypy; \
	run $(BIN)/python -m pytest $(WORKERS) --dist loadfile $(ARGS); \
	run env HF_HUB_OFFLINE=1 PERSRES_BASE=toybox $(BIN)/python -m pytest $(WORKERS) --dist loadscope \
		--nbval-lax --nbval-current-env --nbval-kernel-startup-timeout 600 $(NOTEBOOKS); \
	[ -z "$$failed" ] || { echo "Failed:$$failed" >&2; exit 1; }

rehearse: $(READY)  ## what a release needs once: lessons on every layout, the README in a clone, a browser (an hour)
	$(BIN)/python -m pytest $(WORKERS) -m slow $(ARGS)

lab: $(READY)  ## the notebooks in JupyterLab, 00 first
	$(BIN)/jupyter lab $(LAB) $(ROOT) $(ARGS)

notebooks: $(READY)  ## run every notebook in place and save its outputs
	$(BIN)/python -m notebooks.tools.notebooks run $(ARGS)

gpu: $(READY)  ## every notebook on Stable Diffusion 1.4 (or PERSRES_BASE=sd-2.1) on this machine's GPU, into build
	$(BIN)/python -m notebooks.tools.gpu $(ARGS)

bench: $(READY)  ## time and memory of sampling and training, against the alternatives
	$(BIN)/python -m data.make.bench $(ARGS)

pretrain: $(READY)  ## make the next Toybox from nothing and score it (seven hours; stops and resumes at any point)
	$(BIN)/python -m data.make.pretraining $(ARGS)
	$(BIN)/python -m data.make.toybox_scores --base data/toybox-next

results: $(READY)  ## every table of data/results anew, from the shipped weights, but that of `make bench` (hours)
	$(BIN)/python -m data.make.toybox_scores
	$(BIN)/python -m data.make.toybox_scores --judge
	$(BIN)/python -m data.make.study --out data/results/study
	$(BIN)/python -m data.make.full_size sd-1.4
	$(BIN)/python -m data.make.full_size sdxl

# setuptools by itself, because newer torches ask for a newer one; only reading pyproject.toml depends on it.
colab:  ## every notebook and the libraries' tests on the versions that Colab has, in an environment of their own
	rm -rf $(COLAB)
	$(PYTHON) -m venv $(COLAB)
	grep -Ev '^(torch|setuptools)==' $(VERSIONS) >$(COLAB)/versions.txt
	$(COLAB)/bin/python -m pip install --quiet -r $(COLAB)/versions.txt torch==$(TORCH) nbclient pytest
	$(COLAB)/bin/python -m pip install --quiet --no-deps $$(grep '^setuptools==' $(VERSIONS))
	$(COLAB)/bin/python -m notebooks.tools.colab $(ARGS)

size: $(READY)  ## how many lines of code there are, and how many there should be
	@$(BIN)/python -m pytest -q -rP --durations=0 tests/test_size.py

setup: $(READY)  ## only the virtual environment

clean:  ## remove the virtual environment and what runs have left in build
	rm -rf $(VENV) build

# Done again when a pin or a requirement changes. The mark is written last, so that an interrupted set-up counts for nothing.
$(READY): $(PINS) pyproject.toml
	@python="$(PYTHON)"; refuse() { echo "$$1" >&2; exit 1; }; \
	"$$python" -c '$(FITS)' 2>/dev/null || refuse "persres-lite needs Python 3.10 to 3.14, and \
	$$python is $$("$$python" --version 2>&1 | tail -n 1): install one, or name one, as in: make demo PYTHON=python3.12"; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || refuse "$$python has no venv module to make a virtual \
	environment with: install it (on Debian and Ubuntu: apt install python3-venv)."; \
	echo "Setting up $(VENV) with $$("$$python" --version): once, some minutes and gigabytes."; \
	"$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) --editable ".[notebooks,dev]"
	@touch $(READY)
