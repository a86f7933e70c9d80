# make demo   a Chinese model, from nothing to printed stories, in minutes on a CPU
# make test   every test
# PIP_FLAGS   passed to pip, such as "--index-url ADDRESS" for a mirror or a CPU-only build of PyTorch
# ARGS        passed to train.py (demo) and bench.py (bench), such as ARGS=--max_iters=100

PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=
TEST_ARGS ?= -n 2

ifeq ($(OS),Windows_NT)
BIN = .venv/Scripts
else
BIN = .venv/bin
endif

.PHONY: demo test lint bench clean

demo: .venv/core
	$(BIN)/python data/chinese/prepare.py
	$(BIN)/python train.py config/demo_chinese.py $(ARGS)
	$(BIN)/python sample.py --out_dir=out-demo --start= --num_samples=3 --max_new_tokens=300

test: .venv/dev
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: .venv/dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

bench: .venv/core
	$(BIN)/python bench.py $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/core: requirements-core.txt
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('weiGPT needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements-core.txt
	touch .venv/core

.venv/dev: requirements-dev.txt requirements.txt requirements-web.txt .venv/core
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements-dev.txt
	touch .venv/dev
