# Every target works alone on a fresh machine: the environment is made once, in .venv, and reused.
PYTHON ?= python3
BIN := .venv/bin
# Every process of a run imports torch and Ray: compiling them anew each time would take longer than the import.
unexport PYTHONDONTWRITEBYTECODE
ENVIRONMENT := .venv/installed
# Two test processes, each with a Ray of its own: tests wait for processes to start a third of the time. A file stays
# together, so that its tests share what they start; tests/conftest.py says which files come first.
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow lint simulate fuzz bench chaos clean

demo: $(ENVIRONMENT)  ## train three tasks three ways, export the patches, fit a cascade, write runs/demo/report.html
	$(BIN)/multitask demo

test: $(ENVIRONMENT)  ## everything that needs no minutes of training
	$(BIN)/python -m pytest -m "not slow" $(TWO)

test-slow: $(ENVIRONMENT)  ## tests that train for minutes or start a cluster of their own
	$(BIN)/python -m pytest -m slow $(TWO)

lint: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

simulate: $(ENVIRONMENT)  ## ten thousand simulated runs of all engines, with losses of all kinds; prints each failure's seed
	$(BIN)/python -m tests.simulation --seeds simulate

fuzz: $(ENVIRONMENT)  ## damaged and hostile files: 100,000 bundles, 20,000 of each other kind; prints what came of them
	status=0; \
	FUZZ_CASES=50000 $(BIN)/python -m pytest -s --timeout 0 tests/fuzz/test_bundles.py || status=1; \
	FUZZ_CASES=20000 $(BIN)/python -m pytest -s --timeout 0 tests/fuzz --ignore tests/fuzz/test_bundles.py || status=1; \
	exit $$status

bench: $(ENVIRONMENT)  ## every benchmark; each prints a table and writes benchmarks/results/*.json
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[bench]'
	for file in benchmarks/[a-z]*.py; do \
		name=$$(basename $$file .py); \
		$(BIN)/python -m benchmarks.$$name --out benchmarks/results/$${name}_$$(date +%F).json || exit 1; \
	done
	$(BIN)/python -m benchmarks.engines --model resnet50 --out benchmarks/results/engines_resnet50_$$(date +%F).json

chaos: $(ENVIRONMENT)  ## kills workers, servers, drivers and nodes of two long runs; prints how soon they are back
	$(BIN)/python -m benchmarks.chaos --out benchmarks/results/chaos_$$(date +%F).json

clean:
	rm -rf .venv runs

$(ENVIRONMENT): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "This project needs Python 3.11 or newer; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $(ENVIRONMENT)
