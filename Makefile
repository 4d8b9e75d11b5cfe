# make train / make test need Python >= 3.10 and nothing else; both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-full soak lint clean

# Plain `torch` on a machine without a GPU would pull gigabytes of CUDA; pip finds a CPU wheel of this version.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null 2>&1 || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[train,test]'
	touch $@

train: $(VENV)/installed
	$(BIN)/torchrun --standalone --nproc-per-node 2 train_medqa.py

test: $(VENV)/installed
	$(BIN)/python -m pytest

# Every combination of what `make test` runs a covering array of: at night and before a release.
test-full: $(VENV)/installed
	ZEROLITE_TESTS=full $(BIN)/python -m pytest

# Long campaigns of what `make test` does a tenth of.
soak: $(VENV)/installed
	$(BIN)/python -m pytest -m slow -s

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
