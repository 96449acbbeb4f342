# The targets create the virtual environment .venv and install what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart demo test test-fast lint format bench clean

# The packages that the program needs, with the tested versions.
$(VENV)/installed: pyproject.toml serving/setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[test]' -e './serving[server,test]'
	touch $@

# The packages that benchmarks/ compares with.
$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

# From generated data to served scores in less than a minute, after the installation.
quickstart: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" bash tools/quickstart.sh quickstart

# All steps on generated data: three losses, a table, an export, a server, scored candidates.
demo: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" bash tools/demo.sh demo

# One process per core, at most four: each needs up to a few GB of memory.
test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# Without the tests marked slow: under two minutes on two cores.
test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not slow'

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-bench
	for name in convert input loss metrics training serving batching soak; do \
		echo "== benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name || exit 1; \
	done

clean:
	rm -rf $(VENV) demo quickstart build *.egg-info serving/*.egg-info
