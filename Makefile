# Set-up and everything that is run by hand or by CI. Each target makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# Processes among which the test files are shared: `make test WORKERS=8` on a machine of eight cores, 0 for none.
WORKERS ?= 2

.PHONY: demo test soak mutants lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m timm_kd.demo

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -m "not soak" -n $(WORKERS) --dist loadfile

# Random kills, every precision, the oldest huggingface_hub: too long for CI. With TIMM_TRAIN=path/to/train.py, of a
# checkout of timm, also random flag sets beside timm's own script; with TIMM_TESTS=path/to/tests, timm's tests on ours.
soak: $(VENV)/.test
	$(BIN)/python -m pytest -q -m soak

# Bugs planted into a folder or module of the package, one at a time, each shown to the tests that reach it. Without the
# tests of torch.compile, which cannot look through mutmut's switch between the mutants.
ROOM ?= losses
TESTS_losses := test_losses
TESTS_replay := test_replay or test_data
TESTS_meters := test_engine or test_reference_loop or test_train
mutants: export PYTEST_ADDOPTS := -k "($(or $(TESTS_$(ROOM)),test_$(ROOM))) and not compile"
mutants: $(VENV)/.mutants
	$(BIN)/mutmut run 'timm_kd.$(ROOM).*'
	$(BIN)/mutmut results

lint: $(VENV)/.test
	$(BIN)/ruff check .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check -e '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check -e '.[demo,test]'
	touch $@ $(VENV)/.demo

$(VENV)/.mutants: $(VENV)/.test
	$(BIN)/pip install -q --disable-pip-version-check 'mutmut>=3.8'
	touch $@

clean:
	rm -rf mutants $(VENV) demo_output build *.egg-info
