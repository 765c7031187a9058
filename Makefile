# Two commands on a bare machine: `make quickstart`, `make test`. Each target makes its own environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: several change rounding, and were seen many times slower when another process wants a core.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test test-slow check format bench evidence evidence-dmkd evidence-addp evidence-probe \
	evidence-repfusion evidence-roads evidence-dense docs clean

quickstart: $(VENV)/.ready  ## diffusion models teach small networks: about nine minutes of CPU, then a report
	$(BIN)/diffrep run quickstart --out runs/quickstart

test: $(VENV)/.ready  ## everything but the slow tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.ready  ## style, types, structure, recipes, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py tests/recipes/test_recipes.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready  ## each number a ratio against a named rival, measured in one run
	$(BIN)/python -m benchmarks

evidence: $(VENV)/.ready  ## remakes docs/results/: five seeds; recorded arms are skipped
	$(BIN)/diffrep run quickstart --seeds 0,1,2,3,4 --record docs/results/data --out runs/evidence-quickstart
	$(BIN)/python -m benchmarks.evidence

evidence-dmkd: $(VENV)/.ready  ## the second road: digits with five seeds, sweeps, CIFAR-10 (needs $$DIFFREP_DATA); hours
	$(BIN)/diffrep run dmkd_digits --seeds 0,1,2,3,4 --record docs/results/data --out runs/evidence-dmkd
	$(BIN)/diffrep run dmkd_digits_sweeps --record docs/results/data --out runs/evidence-dmkd-sweeps
	$(BIN)/diffrep run dmkd_cifar10_small --record docs/results/data --out runs/evidence-dmkd-cifar10
	$(BIN)/python -m benchmarks.evidence

evidence-addp: $(VENV)/.ready  ## the third road: digits with five seeds, CIFAR-10 (needs $$DIFFREP_DATA); two hours
	$(BIN)/diffrep run addp_digits --seeds 0,1,2,3,4 --record docs/results/data --out runs/evidence-addp
	$(BIN)/diffrep run addp_cifar10_small --record docs/results/data --out runs/evidence-addp-cifar10
	$(BIN)/python -m benchmarks.evidence

evidence-probe: $(VENV)/.ready  ## taps and noise levels on CIFAR-10, and the search (needs $$DIFFREP_DATA): half an hour
	$(BIN)/python -m benchmarks.evidence_probe

evidence-repfusion: $(VENV)/.ready  ## the first road on CIFAR-10, three seeds (needs $$DIFFREP_DATA): about two hours
	$(BIN)/diffrep run repfusion_cifar10_small --record docs/results/data --out runs/evidence-repfusion
	$(BIN)/python -m benchmarks.evidence

evidence-roads: $(VENV)/.ready  ## the three roads combined on digits, five seeds: about half an hour of CPU
	$(BIN)/diffrep run roads_digits --seeds 0,1,2,3,4 --record docs/results/data --out runs/evidence-roads
	$(BIN)/python -m benchmarks.evidence

evidence-dense: $(VENV)/.ready  ## segmentation and landmarks on digits, three seeds: about an hour of CPU
	$(BIN)/diffrep run dense_digits --record docs/results/data --out runs/evidence-dense
	$(BIN)/python -m benchmarks.evidence

docs: $(VENV)/.ready  ## the manual, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site dist runs

$(VENV): $(VENV)/.ready

# The stamp comes last, so an interrupted installation is done again.
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "diffrep needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
