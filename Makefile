# Each target makes its own .venv when there is none. PYTHON names the interpreter to make it from.
PYTHON ?= python3
STAMP := .venv/.installed
# The trainers that we are compared with have an environment of their own.
PEERS := .venv-bench/.installed
TRL := trl==1.16.0
# DeepSpeed is built for the torch of .venv, whose packages this environment shares.
ZERO := .venv-zero/.installed
DEEPSPEED := deepspeed==0.19.8
# It compiles its operator for CPUs where it is first used: here, before tests that have a time limit.
IN_ZERO := PATH="$(CURDIR)/.venv-zero/bin:$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/.venv-zero/extensions"

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-gpu test-zero check bench bench-step bench-peers bench-gpu

help:
	@echo "make demo    the whole story on a small made-up world: no download, no GPU"
	@echo "make test    all tests"
	@echo "make test-gpu   tests of what differs on a CUDA device, on the one that is there"
	@echo "make test-zero  tests of DeepSpeed, on the CPU"
	@echo "make docs    the documentation as a site, in site/"
	@echo "make check   linter and type checker"
	@echo "make bench   speed and memory: bench-step (against the straightforward way), then bench-peers (against TRL)"
	@echo "make bench-gpu   a 7B-shaped step on the CUDA device that is there"

# torch first, by its exact pin: a range would take another build, several GB larger.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

demo: $(STAMP)
	.venv/bin/dae demo

# Links and anchors are checked: a broken one fails. Search needs a server, pages alone do not.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict
	@echo "site/index.html; with search: .venv/bin/python -m http.server --directory site"

test: $(STAMP)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

test-gpu: $(STAMP)
	@.venv/bin/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch finds no CUDA device; nothing was tested")'
	OMP_NUM_THREADS=4 .venv/bin/python -m pytest -rs tests/dae/align/test_gpu.py

test-zero: $(ZERO)
	$(IN_ZERO) OMP_NUM_THREADS=1 .venv-zero/bin/python -m pytest -rs -k zero tests/dae/align/test_zero.py \
	  tests/dae/align/test_diverged.py

$(ZERO): $(STAMP) Makefile
	$(PYTHON) -m venv .venv-zero
	.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv-zero/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	.venv-zero/bin/python -m pip install --quiet setuptools wheel
	.venv-zero/bin/python -m pip install --quiet --no-build-isolation '$(DEEPSPEED)'
	$(IN_ZERO) .venv-zero/bin/python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()'
	@touch $@

check: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy kd dae eval/dae_eval

bench: bench-step bench-peers

bench-gpu: $(STAMP)
	.venv/bin/python benchmarks/gpu.py

bench-step: $(STAMP)
	.venv/bin/python benchmarks/step_cost.py

bench-peers: $(PEERS)
	.venv-bench/bin/python benchmarks/peers.py

$(PEERS): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt --editable . '$(TRL)'
	@touch $@
