# make demo   trains an embedded text-to-image model with Stepwise-Flow-GRPO and writes runs/demo/report.html
# make check  lint, types and the quick tests, side by side on two cores: two to three minutes on two cores
# make test   everything that is checked: lint, types, all tests
# make format formats the code and fixes what ruff can fix safely
# make bench  the benchmark table of the ops on this device, on all threads and on one, and a picture
#             of how they compare from size to size
# make compare  stepwise against uniform credit, five seeds each, with intervals (an hour and three
#               quarters; goes on after a kill): runs/compare/stepwise_vs_uniform
#               CLAIM=NAME another grid of benchmarks/claims; all of them take a night
# make setup  only makes .venv (the others call it; a second call does nothing)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for pip, e.g. an index that serves CPU builds of PyTorch.
PIP_FLAGS ?=
# Of 20,000 modules a tenth is ever imported: Python compiles those when they are.
PIP := --quiet --no-compile --constraint constraints.txt $(PIP_FLAGS)
# A grid of benchmarks/claims.
CLAIM ?= stepwise_vs_uniform

# Waiting OpenMP threads sleep instead of spinning: on a shared machine a spinning thread takes
# the core that the thread it waits for needs.
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
# What pip has not compiled, the first process that imports it does, for all that follow.
unexport PYTHONDONTWRITEBYTECODE

# What pip has not compiled, one process imports before three would compile it each for itself.
IMPORTED := sfgrpo.trainer, sfgrpo.embedded.judges, tests.support.families, tests.support.served

.PHONY: setup check quick tests test format demo bench compare lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

# The C++ kernels need PyTorch alone and are compiled while the rest is fetched. Where they cannot be,
# the first import says so and plain PyTorch serves.
$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make setup needs Python >= 3.10 ($(PYTHON) not found)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: on Debian, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install $(PIP) torch numpy setuptools
	$(BIN)/python csrc/build.py & $(BIN)/python -m pip install $(PIP) --editable ".[dev]" && wait
	@touch $@

$(VENV)/.imported: $(VENV)/.ready
	TRANSFORMERS_VERBOSITY=error $(BIN)/python -c "import $(IMPORTED)"
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

quick: setup
	$(BIN)/python -m pytest -m "not slow"

# pyright takes as long as the quick tests, each on one core.
check: setup
	$(MAKE) --jobs=2 lint quick

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Three processes of one thread each, for two cores, since some wait: small tensors and Python gain
# nothing from a second thread, and the tests that are about threads set their number. A file stays
# in one process, for its fixtures train and compile; the longest files start first
# (tests/conftest.py).
tests: $(VENV)/.imported
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=15 \
	  --numprocesses 3 --dist loadfile --no-loadscope-reorder

# Types are checked meanwhile: on one core, and they would leave the other idle.
test: setup
	$(MAKE) --jobs=2 lint tests

demo: setup
	$(BIN)/sfgrpo train numbers --run.output_dir runs/demo --fresh

# Waiting threads may spin here, which is what a machine of one's own does.
bench: setup
	env -u OMP_WAIT_POLICY $(BIN)/python -m pytest --benchmark-only
	$(BIN)/python -m benchmarks.ops.crossings

compare: setup
	$(BIN)/sfgrpo compare benchmarks/claims/$(CLAIM).yaml

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
