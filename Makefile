# Each target sets up what it needs and does nothing twice.
#
#   PYTHON   the interpreter that makes the virtual environment
#   VENV     the virtual environment; empty: PYTHON is used as it is, with the packages and the build that it has
#   ARGS     passed on to the command

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

ifeq ($(strip $(VENV)),)
  python := $(PYTHON)
  ready :=
else
  python := $(VENV)/bin/python
  ready := native
endif
stamp := $(VENV)/.pykern-installed

.PHONY: install demo test bench gpu lint native
.DEFAULT_GOAL := install

install: $(ready)

# torch goes first: a package that merely needs some torch would otherwise choose which.
$(stamp): constraints.txt pyproject.toml
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	$(python) -m pip install --constraint constraints.txt torch==2.13.0 setuptools wheel ninja pybind11
	$(python) -m pip install --constraint constraints.txt --no-build-isolation --editable ".[train,test,bench,dev]"
	touch $@

# ninja knows what is up to date.
native: $(stamp)
	$(python) setup.py --quiet build_ext --inplace

lint: $(ready)
	$(python) -m ruff check .
	$(python) -m ruff format --check .

# Two processes of one thread each: more threads than cores make torch's OpenMP crawl. The second run holds the Triton
# kernels against the references and their limits of traffic in Triton's interpreter, which has to be on before Triton
# is imported.
test: export OMP_NUM_THREADS = 1
test: lint
	$(python) -m pytest -n 2 $(ARGS)
	TRITON_INTERPRET=1 $(python) -m pytest -n 2 tests/test_ops.py tests/test_traffic.py $(ARGS)

demo: $(ready)
	$(python) -m pykern demo $(ARGS)

# malloc is to reuse memory: on a CPU fresh pages cost more than the kernels do.
bench: export MALLOC_MMAP_THRESHOLD_ = 4294967296
bench: export MALLOC_TRIM_THRESHOLD_ = 4294967296
bench: $(ready)
	$(python) -m pytest benchmarks $(ARGS)

# What needs a GPU, in ten minutes at the most; `make gpu ARGS=--dry-run` rehearses it on the CPU.
gpu: $(ready)
	$(python) -m pykern.testing.gpu $(ARGS)
