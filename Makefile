# `make demo` and `make test` are all a newcomer needs.
#
# VENV= PYTHON=python3 makes every verb run with an interpreter that already has what is needed, without a network:
#     make gpu-check VENV= PYTHON=python3
VENV ?= .venv
BOOTSTRAP ?= python3
ifneq ($(VENV),)
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
else
PYTHON ?= python3
READY :=
endif
export PYTHONPATH := $(CURDIR):$(CURDIR)/client$(if $(PYTHONPATH),:$(PYTHONPATH))
ARGS ?=
SEED ?=
COUNT ?=
BENCH ?=
RESULTS ?= benchmarks/results/latest
PROFILE ?= cpu

.PHONY: help demo test simulate fuzz soak kill-loop lint format stubs gpu-check bench render loadtest loadtest-sweep wheelhouse clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

# torch comes first and by its exact version: a range would take the newest build with all its CUDA packages.
$(VENV)/.ready: pyproject.toml client/pyproject.toml constraints.txt
	$(BOOTSTRAP) -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PYTHON) -m pip install -q -c constraints.txt -e ./client -e '.[dev,load,bench]'
	$(PYTHON) -m pip install -q -c constraints.txt --only-binary atheris -e '.[fuzz]' || echo 'no atheris for this system: test and fuzz go without'
	@touch $@

demo: $(READY)  ## start the service, search real text, check every row (ARGS="--keys 65536 --synthetic --json")
	@$(PYTHON) -m streamindex_service demo $(ARGS)

test: $(READY)  ## all CPU tests, in JOBS processes (2)
	$(PYTHON) -m pytest -m "not gpu" -n $(or $(JOBS),2) --dist loadfile $(ARGS)

simulate: $(READY)  ## seeded histories of governor, scheduler and caches (SEED=4711 tells one of them)
	$(PYTHON) -m streamindex_service.testing.simulation $(SEED)

fuzz: $(READY)  ## a million inputs against parsers and a server, about an hour (SEED=1 COUNT=1000000)
	if $(PYTHON) -c 'import atheris'; then $(PYTHON) -m tests.security.guided --seed $(or $(SEED),1) --count $(or $(COUNT),1000000); \
	else echo 'the guided run is left out'; fi
	$(PYTHON) -m tests.security.fuzz --seed $(or $(SEED),1) --count $(or $(COUNT),1000000)

soak: $(READY)  ## 100,000 caches opened and dropped, half of them aborted: 20 minutes, soak.json in RESULTS (COUNT=100000)
	@mkdir -p $(RESULTS)
	$(PYTHON) -m tests.faults.soak --caches $(or $(COUNT),100000) --out $(RESULTS)/soak.json

kill-loop: $(READY)  ## processes killed or stopped at every hand-over while callers are at work, kill_loop.json in RESULTS (SEED=1 COUNT=50)
	@mkdir -p $(RESULTS)
	$(PYTHON) -m tests.faults.kill_loop --seed $(or $(SEED),1) --rounds $(or $(COUNT),50) --out $(RESULTS)/kill_loop.json

lint: $(READY)  ## ruff, mypy, buf, stubs up to date
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(if $(VENV),PATH="$(CURDIR)/$(VENV)/bin:$$PATH") buf lint
	$(PYTHON) tools/build_stubs.py --check

format: $(READY)  ## write what lint asks for
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

stubs: $(READY)  ## build the protobuf stubs from proto/
	$(PYTHON) tools/build_stubs.py

gpu-check:  ## on a CUDA host: tests marked gpu, then the benchmarks, results as JSON (BENCH="--only NAME --quick")
	$(PYTHON) -m pytest -m gpu $(ARGS)
	$(PYTHON) -m benchmarks --out $(RESULTS) $(BENCH)

bench:  ## the benchmarks that a CPU host can run
	$(PYTHON) -m benchmarks --out $(RESULTS) $(BENCH)

render: $(READY)  ## tables and pictures of the results in RESULTS, on any host
	$(PYTHON) -m benchmarks.render $(RESULTS)

loadtest: $(READY)  ## a load test and its report in RESULTS (PROFILE=h200 on such a host, ARGS="--address unix:///PATH")
	$(PYTHON) -m loadtests run --profile $(PROFILE) --out $(RESULTS) $(ARGS)

loadtest-sweep: $(READY)  ## offered load against latency and refusals, and where the knee is, in RESULTS
	$(PYTHON) -m loadtests sweep --profile $(PROFILE) --out $(RESULTS) $(ARGS)

wheelhouse: $(READY)  ## .wheels/: what an offline CUDA host with Python 3.12, torch and triton lacks
	$(PYTHON) tools/wheelhouse.py .wheels

clean:  ## everything that make made
	rm -rf $(VENV) .wheels .pytest_cache .mypy_cache .ruff_cache
