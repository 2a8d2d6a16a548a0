# Two commands work on a fresh clone with Python, git and make only:
#   make demo    watch the five threads happen and be solved, on real data
#   make test    lint, types, tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint types tests bench format clean

demo: $(READY)
	$(BIN)/stillnorm demo

test: lint types tests

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

tests: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

bench: $(READY)
	$(BIN)/python benchmarks/frozen_layer.py
	$(BIN)/python benchmarks/folded_layer.py
	$(BIN)/python benchmarks/recalibrate.py --batches 8 8 8 8 --threads 1
	$(BIN)/python benchmarks/check.py --networks torchvision/resnet50
	$(BIN)/python benchmarks/folded_network.py --batches 8 --seconds 30 \
	    --networks torchvision/resnet50 torchvision/mobilenet_v2 --plot plots

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and alone: the constraint names the CPU build, and everything else then fits it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
	    --editable '.[demo]' hatchling ruff mypy pytest pytest-timeout pytest-xdist hypothesis \
	    jsonschema \
	    torchvision timm transformers onnx onnxscript onnxruntime keras jax
	touch $(READY)
