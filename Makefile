# `make demo` and `make test` do all of their own set-up. `make help` lists everything.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONVERTER := $(VENV)/share/llama-cpp-converter
CONVERTER_REQUIREMENTS := tasks/export/converter-requirements.txt
SETUP := $(VENV)/.setup
SETUP_TEST := $(VENV)/.setup-test
CONSTRAINTS := constraints.txt
EXTRAS := demo
TEST_EXTRAS := $(EXTRAS),cluster,dev,judge
TORCH = $(shell grep '^torch==' $(CONSTRAINTS))
PYTORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help
help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

.PHONY: setup
setup: $(SETUP) ## make .venv with all that the demo needs

.PHONY: setup-test
setup-test: $(SETUP_TEST) ## add what the tests need: Ray, Dask, a judge's client, the developer's tools

$(SETUP): pyproject.toml $(CONSTRAINTS) $(CONVERTER_REQUIREMENTS) | $(VENV)/.torch
	@echo "Installing the rest. It takes minutes, most of them where llama.cpp is compiled."
	$(BIN)/pip install --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	$(BIN)/pip install --no-deps --require-hashes --upgrade --target $(CONVERTER) --requirement $(CONVERTER_REQUIREMENTS)
	@touch $@
	@echo "Set-up is done."

$(SETUP_TEST): $(SETUP)
	$(BIN)/pip install --constraint $(CONSTRAINTS) --editable '.[$(TEST_EXTRAS)]'
	@touch $@

# On Linux without an NVIDIA GPU: torch's CPU build, from where pip looks, or else from PyTorch's own index. Where neither
# has it, the next step installs PyPI's build, which needs CUDA's libraries on every machine.
$(VENV)/.torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "NVIDIA GPU found: torch with CUDA."; \
	elif [ "$$(uname -s)" = Linux ]; then \
	  echo "No NVIDIA GPU found: looking for torch's CPU build."; \
	  $(BIN)/pip install --no-deps "$(TORCH)+cpu" || { \
	  echo "pip does not find it where it looks: trying PyTorch's own index."; \
	  $(BIN)/pip install --no-deps --timeout 10 --retries 1 --index-url $(PYTORCH_INDEX) "$(TORCH)+cpu"; } || \
	  echo "No CPU build was installed, see above. PyPI's comes with CUDA: 2.5 GB more to download, 4 GB more on disk."; \
	fi
	@touch $@

.PHONY: setup-unsloth
setup-unsloth: ## on a CUDA machine: make .venv-unsloth, where the baseline trains with Unsloth's kernels
	$(MAKE) setup VENV=.venv-unsloth EXTRAS=gpu CONSTRAINTS=constraints-gpu.txt

.PHONY: demo
demo: $(SETUP) ## fine-tune SmolLM2-135M with GRIT, write the report, put the model where Ollama finds it
	$(BIN)/llama3-grit finetune --preset demo --method grit

# Six trainings and all that is measured of them in half an hour, on CPUs without bfloat16 too: a fifth of the steps of the
# demo, and the exact match of the answers in the report in place of lm-eval's.
.PHONY: compare-demo
compare-demo: $(SETUP) ## train the demo by AdamW and by GRIT with three seeds each, and write a report
	$(BIN)/llama3-grit compare --preset demo --methods baseline,grit --seeds 3 \
	  --training.max_steps 16 --training.eval_tokens 2000 --scoring.tasks '[]' --scoring.samples 0

.PHONY: chat
chat: $(SETUP) ## talk to the demo's model, no Ollama needed
	$(BIN)/llama3-grit chat --preset demo --method grit

# By default the port that this checkout's server has, or else had, or else 4200.
PORT :=

.PHONY: serve
serve: $(SETUP) ## start a Prefect server and a worker in the background, with the deployments; repeat lost runs
	@$(BIN)/llama3-grit serve $(if $(PORT),--port $(PORT))

.PHONY: down
down: ## stop them; runs keep their checkpoints, and the next `make serve` goes on with them
	@$(BIN)/llama3-grit down

.PHONY: test-fast
test-fast: $(SETUP_TEST) ## run the tests that need no torch, no server and no model
	$(BIN)/pytest --fast --numprocesses 2 --dist loadfile

# Much of the time goes by waiting, for servers and for processes that begin, so that three share two cores. In the order
# of their names: by default files of few tests, which are the longest here, would come last.
.PHONY: test
test: lint ## lint, then run all tests
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 40 --durations-min 3

.PHONY: lint
lint: $(SETUP_TEST) ## check style, types, the import rule, and how long the sentences of the pages are
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_prose.py README.md docs/*.md CONTRIBUTING.md

# ALPACA=FILE measures convergence on a second data set too, a JSON list of rows with `instruction`, `input` and `output`.
# The trainings in the tracked results count as done where the machine computes in bfloat16, as they did; and on a second
# data set if the file is named alpaca_en_800.json.
ALPACA :=
BENCH := .artifacts/benchmarks
ON_ALPACA := --data '$(ALPACA)' --methods AdamW 'LoRA+ (PEFT)' 'AdamW, gradient basis' 'AdamW, whitened basis' 'kfac^1/2' 'kfac^1/2, gradient basis' 'kfac^1/2, gradient basis of one batch'

bench: export DO_NOT_TRACK := 1
bench: export TOKENIZERS_PARALLELISM := false

.PHONY: bench
bench: $(SETUP) $(BENCH)/extraction.jsonl $(if $(ALPACA),$(BENCH)/alpaca.jsonl) ## measure what Prefect, caching, kills, merging and GRIT cost, and who converges fastest (several hours; ALPACA=FILE for a second data set)
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.crash --set training.max_steps=8
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.grit_overhead
	$(BIN)/python -m benchmarks.grit_overhead --variant graft
	$(BIN)/python -m benchmarks.grit_overhead --variant eigen_adam
	@if nvidia-smi -L >/dev/null 2>&1; then $(BIN)/python -m benchmarks.grit_overhead --shape llama3-8b --quantization nf4 --gradient-checkpointing; fi
	$(BIN)/python -m benchmarks.step_ratios --out $(BENCH)/step_ratios.json
	$(BIN)/python -m benchmarks.grit_convergence --results $(BENCH)/extraction.jsonl
	$(BIN)/python -m benchmarks.grit_convergence --results $(BENCH)/extraction.jsonl --rates 1e-4 --methods AdamW 'AdamW, whitened basis' 'kfac^1/2, gradient basis'
	$(BIN)/python -m benchmarks.grit_convergence --results $(BENCH)/extraction.jsonl --rates 3e-3 --seeds --ablations
	$(BIN)/python -m benchmarks.convergence_report $(BENCH)/extraction.jsonl --step-ratios $(BENCH)/step_ratios.json --picture $(BENCH)/extraction.png
	$(if $(ALPACA),$(BIN)/python -m benchmarks.grit_convergence $(ON_ALPACA) --results $(BENCH)/alpaca.jsonl)
	$(if $(ALPACA),$(BIN)/python -m benchmarks.convergence_report $(BENCH)/alpaca.jsonl --step-ratios $(BENCH)/step_ratios.json --picture $(BENCH)/alpaca.png)

# New trainings are added to a copy: the tracked results change only when somebody copies it back.
$(BENCH)/%.jsonl: | benchmarks/results/%.jsonl
	@mkdir -p $(@D)
	cp benchmarks/results/$*.jsonl $@

# The source package of llama-cpp-python holds templates of well-known models. pip fetches and unpacks it to read its
# metadata, and compiles nothing.
TEMPLATES := .artifacts/chat-templates
LLAMA_CPP = $(shell grep '^llama_cpp_python==' constraints.txt)
LLAMA_CPP_SOURCE = $(subst ==,-,$(LLAMA_CPP))

.PHONY: templates
templates: $(SETUP) $(TEMPLATES) ## render 70 well-known chat templates by llama.cpp's server and by Transformers, and compare (minutes)
	$(BIN)/python -m benchmarks.templates $(TEMPLATES) --differences

$(TEMPLATES): | $(SETUP)
	$(BIN)/pip download --no-deps --no-binary llama-cpp-python --dest $@.source '$(LLAMA_CPP)'
	mkdir -p $@.draft
	tar -xzf $@.source/$(LLAMA_CPP_SOURCE).tar.gz -C $@.draft --strip-components=5 $(LLAMA_CPP_SOURCE)/vendor/llama.cpp/models/templates
	rm -r $@.source
	mv $@.draft $@

.PHONY: clean-artifacts
clean-artifacts: $(SETUP) ## remove outputs that the newest models do not need, after asking
	@$(BIN)/llama3-grit prune

.PHONY: clean
clean: ## remove .venv (artifacts stay)
	rm -rf $(VENV)
