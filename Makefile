.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := $(VENV)-lowest
TOOLS := $(VENV)-tools
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
# what the tests use; ray has an environment of its own, for it holds joblib back
EXTRAS := demo,export,app,dashboard,sweep,slurm

.PHONY: help demo test test-slow test-lowest lint type licences audit sync clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

demo: $(VENV)/.demo ## install, meta-train on the embedded data, compare with ImageNet fine-tuning
	$(BIN)/python experiments/main_table.py --rows imagenet reptile fomaml_star --tasks 40 --seeds 0 --out runs/demo
	$(BIN)/python -m metaseg.ship runs/demo/*-s0

test: $(VENV)/.dev ## install, then run the tests
	$(BIN)/python $(PYTEST)

test-slow: $(VENV)/.dev ## the tests that take many processes or a browser
	$(BIN)/python -m pytest -m slow

test-lowest: $(LOWEST)/.done ## the tests with the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python $(PYTEST)

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

type: $(VENV)/.dev ## mypy, strict on the package
	$(BIN)/mypy

licences: $(VENV)/.dev ## fail on a licence that is unknown, or copyleft beyond LGPL and MPL
	$(BIN)/python experiments/licences.py --extras $(EXTRAS)

audit: $(TOOLS)/.done ## known vulnerabilities in what pip would install today; asks pypi.org's database
	$(TOOLS)/bin/uv pip compile --quiet --upgrade --all-extras --generate-hashes --output-file $(TOOLS)/audited.txt pyproject.toml
	@rm -f $(TOOLS)/found.txt
	@$(TOOLS)/bin/pip-audit --strict --disable-pip --requirement $(TOOLS)/audited.txt --output $(TOOLS)/found.txt || \
	  { cat $(TOOLS)/found.txt 2>/dev/null || echo "Not audited: the database did not answer for what is named above."; exit 1; }

sync: $(VENV)/.demo ## upload the offline W&B runs below runs/ and multirun/
	@find runs multirun -type d -name 'offline-run-*' 2>/dev/null | grep -q . || echo "no offline W&B runs here"
	@find runs multirun -type d -name 'offline-run-*' -print0 2>/dev/null | xargs -0 -r $(BIN)/wandb sync --skip-synced

clean: ## remove the virtual environments and the runs
	rm -rf $(VENV) $(LOWEST) $(TOOLS) runs multirun

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS),dev]'
	touch $@

$(LOWEST)/.done: pyproject.toml $(TOOLS)/.done
	$(TOOLS)/bin/uv venv --quiet --clear --python 3.11 $(LOWEST)
	$(TOOLS)/bin/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct --editable '.[$(EXTRAS),tensorboard,dev]'
	touch $@

$(TOOLS)/.done:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet uv pip-audit
	touch $@
