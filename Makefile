PYTHON ?= python3.11
# One environment per Python, so that both release lines of megatron-core can be installed side by side.
VENV ?= .venv$(if $(filter python3.11,$(notdir $(PYTHON))),,-$(notdir $(PYTHON)))
# pip's requirement for torch; pip's variables (PIP_EXTRA_INDEX_URL, ...) choose the build: docs/start/install.md.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# An environment with Transformer Engine, for test-te; TE_WHEELS is a folder that keeps the built wheels.
TE_PYTHON ?= python3.12
TE_VENV ?= .venv-te
TE_TORCH ?= torch==2.11.0
TE_WHEELS ?=
TE_INSTALLED := $(TE_VENV)/.installed

.PHONY: venv quickstart test test-te test-all parity soak fuzz lint format docs clean

venv: $(INSTALLED)

# torch first, so that the packages after it use the installed version.
$(INSTALLED): setup.py
	mkdir -p $(VENV) && date +%s > $(VENV)/.begun
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[test,dev,quickstart]"
	echo $$(($$(date +%s) - $$(cat $(VENV)/.begun))) > $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/python -m examples.quickstart --install-seconds $$(cat $(INSTALLED))

# Files run in folder order: the many short tests come last and keep every process busy to the end.
SPREAD := --dist loadfile --no-loadscope-reorder
# Slow tests that measure how fast a hang is detected, or that run Slurm: they run after the others, one at a time.
ALONE := $(wildcard tests/faults/test_launch*.py tests/faults/test_sigkill*.py) \
	tests/faults/test_rank_faults.py tests/faults/test_rank_heartbeat.py tests/faults/test_rank_signals.py tests/slurm

# Three processes on two cores: tests of launchers mostly wait.
test: $(INSTALLED)
	@$(BIN)/python -m pytest -m "not slow and not te" -n 3 $(SPREAD)

# Transformer Engine's own classes on the CPU: docs/start/install.md. TE_VENV may already have them.
test-te: $(TE_INSTALLED)
	$(TE_VENV)/bin/python -m pytest tests/te

$(TE_INSTALLED):
	test -x $(TE_VENV)/bin/python || $(TE_PYTHON) -m venv $(TE_VENV)
	$(TE_VENV)/bin/python -m pip install --quiet --upgrade pip setuptools wheel
	$(TE_VENV)/bin/python -m pip install --quiet "$(TE_TORCH)"
	$(TE_VENV)/bin/python -m pip install --quiet -e ".[test]"
	tests/te/install.sh $(TE_VENV)/bin/python $(TE_WHEELS)
	touch $(TE_INSTALLED)

# Both parts run and report, even if the first one fails.
test-all: $(INSTALLED)
	@failed=0; \
	$(BIN)/python -m pytest -n 2 $(SPREAD) $(ALONE:%=--ignore=%) || failed=1; \
	$(BIN)/python -m pytest $(ALONE) || failed=1; \
	exit $$failed

# About 45 minutes; writes docs/internals/parity.md and runs/parity.json.
parity: $(INSTALLED)
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m parity

# Random faults, one a minute, for 20 minutes; compared with an undisturbed run. With SOAK="--nodes 2", nodes are lost.
soak: $(INSTALLED)
	mkdir -p runs
	PYTHONPATH=.:tests:tests/faults:benchmarks OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m soak --minutes 20 --out runs/soak.json $(SOAK)

# 10,000 mutated files over five seeds, in a few minutes; fails if a file is lost silently or breaks a reader.
fuzz: $(INSTALLED)
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m fuzz $(FUZZ)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation site, in site/.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(TE_VENV) .mypy_cache .ruff_cache .pytest_cache build site *.egg-info
