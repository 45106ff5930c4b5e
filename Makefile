# Set-up and everything that is run by hand or by CI. Each target makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# Processes among which the test files are shared: `make test WORKERS=8` on a machine of eight cores, 0 for none.
WORKERS ?= 2

.PHONY: demo test soak lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m timm_kd.demo

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -m "not soak" -n $(WORKERS) --dist loadfile

# Random kills, every precision, the oldest huggingface_hub: too long for CI.
soak: $(VENV)/.test
	$(BIN)/python -m pytest -q -m soak

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

clean:
	rm -rf $(VENV) demo_output build *.egg-info
