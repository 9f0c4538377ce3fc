# One word per job; CI says the same words.
#
#   make serve                      serve the demo checkpoint: set up, package, start, wait until a caption works
#   make serve CHECKPOINT=best.pt   serve your own
#   make test                       set up, check, run all tests, say which lines they ran
#   make test-hostile               the attacks at full length: about half an hour
#   make bench                      every stage beside its peers, the load, the scale and batch jobs: an hour
#   make bench-gpu                  each stage on a GPU, and training at full size: a quarter of an hour
#   make check                      format, lint, types, known vulnerabilities of what is installed
#   make demo-model                 render the demo world, train on it, evaluate: model_store/demo.pt and examples/; goes on after a kill
#   make clean                      remove what these jobs made, but for the environment

PYTHON ?= python3
CHECKPOINT ?= model_store/demo.pt
CONFIG ?= config.properties
DEMO_DATA ?= data/demo
DEMO_RUN ?= runs/demo

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What the tests start beside TorchServe.
PROGRAMS := nginx prometheus
PROGRAMS_READY := $(VENV)/debian/.ready
# Absolute, because the servers that the tests start run in folders of their own.
COVERAGE := COVERAGE_FILE=$(CURDIR)/.coverage/data $(BIN)/coverage
# The tests run 95 %. Processes that tests kill may not say what they ran.
COVERED_PERCENT := 94

.PHONY: serve test test-hostile check bench bench-gpu demo-model clean
.DELETE_ON_ERROR:

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(PROGRAMS_READY): Makefile tests/bring_programs.sh $(READY)
	tests/bring_programs.sh $(@D) $(PROGRAMS)
	touch $@

serve: $(READY)
	$(BIN)/etenet package $(CHECKPOINT)
	exec $(BIN)/etenet serve --config $(CONFIG)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	-$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

test: check $(PROGRAMS_READY)
	rm -rf .coverage && mkdir .coverage
	$(COVERAGE) run -m pytest
	$(COVERAGE) combine --quiet
	$(COVERAGE) report --fail-under=$(COVERED_PERCENT)

test-hostile: $(READY) $(PROGRAMS_READY)
	$(BIN)/pytest --hostile -rP tests/test_hostile.py tests/test_reliability.py tests/test_overload.py tests/test_sandbox.py tests/test_jobs.py tests/test_resume.py tests/test_video.py

bench: $(READY)
	for name in decode encoder search server saturation scale jobs; do $(BIN)/python -m benchmarks.$$name || exit 1; done

bench-gpu: $(READY)
	for name in gpu training; do $(BIN)/python -m benchmarks.$$name || exit 1; done

demo-model: $(READY)
	$(BIN)/python -m training.prepare demo --out $(DEMO_DATA)
	$(BIN)/python -m training.stills demo --data $(DEMO_DATA) --out $(DEMO_RUN)/encoder.pt
	$(BIN)/python -m training.train demo --stage 1 --resume --data $(DEMO_DATA) --out $(DEMO_RUN) --encoder-weights $(DEMO_RUN)/encoder.pt
	$(BIN)/python -m training.train demo --stage 2 --resume --data $(DEMO_DATA) --out $(DEMO_RUN)
	$(BIN)/python -m training.ship --run $(DEMO_RUN) --data $(DEMO_DATA)

clean:
	rm -rf data runs model_store/*.mar .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
