# make demo: install and run the offline demo.  make test: install and run the tests.  make help: the rest.
PYTHON ?= python3
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
INSTALLED := $(VENV)/installed-$(EXTRA)
TESTING := $(VENV)/installed-$(EXTRA)-test

# modules whose public names other programs use
API := semdict semdict.pipeline.shards semdict.pipeline.tokenizers semdict.pipeline.kmeans semdict.pipeline.analysis \
  semdict.train.masked.released semdict.train.masked.losses semdict.train.vcq.schedule

.PHONY: help demo test campaign lint format preset graph check demo-weights replicate figures docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRA)]'
	@touch $@

$(TESTING): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRA),test]'
	@touch $@ $(INSTALLED)

demo: $(INSTALLED) ## run the offline demo to verified token shards and trained models
	@grep -qE '^preset: demo( |$$)' params.yaml || { echo 'params.yaml holds another preset: make preset NAME=demo'; exit 2; }
	semdict check
	dvc repro
	semdict shards verify shards/demo
	@semdict shards info shards/demo
	semdict report
	@echo 'tokens: shards/demo   runs: runs/demo   metrics, plots, pictures: reports/demo   all of it: reports/demo/report.html'

test: $(TESTING) ## run the tests
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile

lint: $(TESTING) ## check style and format
	ruff check .
	ruff format --check .

format: $(TESTING) ## rewrite to the project's format
	ruff check --fix .
	ruff format .

preset: $(INSTALLED) ## make preset NAME=in1k: write params.yaml for a preset (yours is kept as params.yaml.before)
	semdict preset '$(NAME)'

graph: $(INSTALLED) ## list every stage of the preset, in order
	dvc repro --dry --force

check: $(INSTALLED) ## validate params.yaml and name missing inputs
	semdict check

demo-weights: $(INSTALLED) ## train the demo's shipped VQGAN and teacher again
	python -m demo.images --out demo/assets/images
	python -m demo.train_teacher
	python -m demo.train_vqgan --grid docs/figures/demo_reconstructions.png

replicate: $(INSTALLED) ## the papers' comparisons over seeds: on the demo's tokens, or make replicate PRESET=imagenette
ifeq ($(PRESET),)
	python -m replicate.lease
	python -m replicate.vcq
else
	@grep -qE '^preset: $(PRESET)( |$$)' params.yaml || { echo 'params.yaml holds another preset: make preset NAME=$(PRESET)'; exit 2; }
	dvc repro encode
	python -m replicate.photographs
	python -m replicate.document
endif

campaign: $(TESTING) ## kill every command at every file event, flip bits, feed bad inputs (30 minutes; again: goes on)
	OMP_NUM_THREADS=1 python -m tests.campaign

figures: ## cut the documents' pictures from the demo's reports
	python -m demo.figures

docs: $(TESTING) ## write the Python API as HTML to build/api, from the docstrings
	python -m pdoc --output-directory build/api $(API)

clean: ## remove everything that commands made, the environment included
	rm -rf $(VENV) build work data runs reports shards/demo demo/assets *.egg-info
