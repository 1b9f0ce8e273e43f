# Everything runs in .venv, made from the pinned versions in requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := offsite-demo
BENCH := offsite-bench
DATA ?= ../shared/data

.DEFAULT_GOAL := help
.PHONY: help install demo demo-vision check test test-all test-gpu bench bench-gpu bench-long bench-race bench-versions bench-pieces bench-images bench-images-long format docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-18s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with the pinned dependencies

demo: $(STAMP) ## play both parties on a real language model (ARGS="--full" for the bounds as well)
	$(BIN)/offsite demo --workdir $(DEMO) --json $(DEMO)/result.json $(ARGS)

demo-vision: $(STAMP) ## the same on an image encoder and handwritten digits (ARGS="--images FOLDER" for pictures of yours)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[demo-vision]'
	$(BIN)/offsite demo --vision --workdir $(DEMO)-vision --json $(DEMO)-vision/result.json $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check ## format, lint, types, import contracts, tests on one form of each kind of block
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-all: check ## the same with every form of every family, and with branch coverage
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --every-form --cov --cov-report=term

test-gpu: $(STAMP) ## the tests that need a CUDA device, on one or two of them; says which were skipped, and why
	$(BIN)/python -m pytest -m gpu -rs tests/gpu

bench-gpu: $(STAMP) ## speed and memory of a LoRA step against PEFT on a CUDA device (ARGS="--shape 7b" for a large one)
	$(BIN)/python -m benchmarks.gpu --result $(BENCH)/gpu.json $(ARGS)

bench: $(STAMP) ## speed and memory of tuning against peers, short form (DATA=folder of data sets)
	$(BIN)/python -m benchmarks.tuning --data-root $(DATA) --cells smollm2/sciq --quick \
	  --contestants full lora "offsite lora" --result $(BENCH)/tuning-short.json --work $(BENCH)

bench-long: $(STAMP) ## every shape and data set, and start-up; writes benchmarks/results and docs/performance.md
	$(BIN)/python -m benchmarks.tuning --data-root $(DATA) --work $(BENCH) --predict
	$(BIN)/python -m benchmarks.tuning --data-root $(DATA) --work $(BENCH)
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.render

bench-race: $(STAMP) ## time to a held-out loss, emulators of several sizes against the full model; writes as bench-long does
	$(BIN)/python -m benchmarks.time_to_loss --data-root $(DATA) --work $(BENCH)
	$(BIN)/python -m benchmarks.render

bench-versions: $(STAMP) ## speed and memory of this version against another checkout, taking turns (BEFORE=folder)
	$(BIN)/python -m benchmarks.versions $(BEFORE) --data-root $(DATA) --work $(BENCH)-versions
	$(BIN)/python -m benchmarks.render

bench-pieces: $(STAMP) ## what each piece of the tuning's speed and memory is worth; writes as bench-long does
	$(BIN)/python -m benchmarks.ablation --data-root $(DATA) --work $(BENCH)
	$(BIN)/python -m benchmarks.render

bench-images: $(STAMP) ## speed and memory of tuning on pictures against peers, short form: ViT-S/14's shape
	$(BIN)/python -m benchmarks.images --cells vit-s-14 --quick --repetitions 3 --work $(BENCH) \
	  --contestants full lora "offsite lora, 0-4-4" --result $(BENCH)/images-short.json

bench-images-long: $(STAMP) ## both encoders and every contestant; writes benchmarks/results and docs/performance.md
	$(BIN)/python -m benchmarks.images --work $(BENCH)
	$(BIN)/python -m benchmarks.render

format: $(STAMP) ## format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## write docs/models.md, docs/reference.md and the table in README.md from the code and the results
	$(BIN)/python docs/render_models.py
	$(BIN)/python docs/render_reference.py
	$(BIN)/python docs/render_readme.py

clean: ## remove .venv and everything that the tools made; the demo's folder stays
	rm -rf .venv .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis build .coverage .coverage.*
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info src/offsite/kernels/cpu/_kernels*.so

$(STAMP): pyproject.toml requirements.lock src/offsite/kernels/cpu/_kernels.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "offsite needs Python 3.11 or newer; '$(PYTHON)' is missing or older."; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint requirements.lock --editable '.[gguf,dev]'
	@touch $(STAMP)
