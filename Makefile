# Every target sets up what it needs: Python 3.11 to 3.13, make and a C++ compiler are enough to start with.

PYTHON ?= python3
RUNS ?= runs
# Of the demo; reproduce-all adds seeds until its statements are decided.
SEEDS ?= 0,1,2
WORKERS ?= 2
PROFILE ?= embedded
# EXTRAS=dev,fairseq,models adds fairseq's own Transformer, other people's models and loops, and their tests.
EXTRAS ?= dev

BIN := .venv/bin
TYPED := .mypy_cache/typed
INSTALLED := .venv/installed-$(EXTRAS)
# One run after the other on all cores; run folders that are complete are left as they are.
DEMO := $(BIN)/fp8repro train -m precision=fp32,fp8 seed=$(SEEDS) run_dir=$(RUNS)/demo resume=auto

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint reproduce-all compare bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## train ResNet-18 in FP32 and FP8 on handwritten digits, print both beside the paper
	$(DEMO) model=resnet18
	$(BIN)/fp8repro compare $(RUNS)/demo

test: $(INSTALLED) ## the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

test-long: $(INSTALLED) ## the tests that take minutes each
	$(BIN)/pytest -m long

lint: $(INSTALLED) ## formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# mypy maps no package to another folder: among links, kernels/ is fp8repro.kernels, and nothing has two names.
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/fp8repro && ln -s $(CURDIR)/fp8repro/* $(CURDIR)/kernels $(TYPED)/fp8repro/
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p fp8repro

reproduce-all: SEEDS := $(if $(filter file,$(origin SEEDS)),auto,$(SEEDS))
reproduce-all: $(INSTALLED) ## all tables and studies of the paper (PROFILE=, ONLY=, SEEDS=1, ARGS='--images ...')
	@# The page is written when runs failed, too: it says which.
	$(BIN)/fp8repro reproduce profile=$(PROFILE) --seeds $(SEEDS) --runs $(RUNS) $(if $(ONLY),--only $(ONLY)) $(ARGS); \
		status=$$?; test $$status -gt 1 || $(BIN)/fp8repro report $(RUNS)/$(PROFILE); exit $$status

compare: $(INSTALLED) ## tables of all runs beside the paper
	$(BIN)/fp8repro compare $(RUNS)

bench: $(INSTALLED) ## speed of the quantizer and of a training step on this machine
	$(BIN)/fp8repro bench quantize
	$(BIN)/fp8repro bench step

setup: $(INSTALLED) ## virtual environment in .venv with everything installed

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "PYTHON=$(PYTHON): got $$($(PYTHON) --version 2>&1), expected Python 3.11 to 3.13"; exit 2; }
	@echo "installing into .venv: some minutes and 6 GB the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

clean: ## remove the environment and build products; runs stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
