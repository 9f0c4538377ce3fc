# One word per job; CI says the same words.
#
#   make serve                      serve model_store/real.pt: set up, package, start, wait until a caption works
#   make serve CHECKPOINT=best.pt   serve your own
#   make serve TORCH=cpu            the same without what a GPU needs: installs 1 GB instead of 6, if there is no .venv yet
#   make test                       set up, check, run all tests, say which lines they ran
#   make test-hostile               the attacks at full length, and long tests: some hours, on an idle machine
#   make bench                      every stage compared with others, load, scale, batch jobs: an hour; needs ETENET_REFERENCE_DATA
#   make bench-gpu                  each stage on a GPU, and training at full size: a quarter of an hour
#   make test-wheels                the wheel, on each Python, with the oldest and newest libraries it allows: 4 minutes or more
#   make test-wheels EXTRAS=1       the same with training, int8, Ray and spans: a quarter of an hour
#   make check                      format, lint, types, known vulnerabilities of what is installed
#   make demo-model                 render the demo world, train, evaluate: model_store/demo.pt and examples/; continues after a kill
#   make real-model REFERENCE=DIR   train on real frames: model_store/real.pt; continues after a kill
#   make page-picture               take the picture of the page in the README again
#   make clean                      remove what these commands made, except .venv; data and runs of your own stay

PYTHON ?= python3
CHECKPOINT ?= model_store/real.pt
CONFIG ?= config.properties
DEMO_DATA ?= data/demo
DEMO_RUN ?= runs/demo
REFERENCE ?= ../shared/reference
REAL_DATA ?= data/real
REAL_RUN ?= runs/real

VENV := .venv
BIN := $(VENV)/bin
TORCH_FOR_CPU := $(VENV)/.torch-for-cpu
CHOSEN_TORCH := $(if $(filter cpu,$(TORCH)),$(TORCH_FOR_CPU))
SERVING := $(VENV)/.serving
SERVING_SIZE := $(if $(CHOSEN_TORCH),1 GB,6 GB: make serve TORCH=cpu saves 5 where there is no GPU)
READY := $(VENV)/.ready
# uv, if it is installed, needs a tenth of the time (make UV= uses pip). Neither compiles bytecode, which takes a minute.
UV := $(shell command -v uv)
INSTALL := $(if $(UV),uv pip install --python $(BIN)/python,$(BIN)/pip install --disable-pip-version-check --no-compile) --constraint constraints.txt
# PyTorch's index of builds for a CPU. PyPI's torch is built for CUDA.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Programs that the tests start in addition to TorchServe.
PROGRAMS := nginx prometheus zsh zsh-common chromium-headless-shell
PROGRAMS_READY := $(VENV)/debian/.ready
# The generator of clients in TypeScript, if there is npm.
NPM_READY := $(VENV)/npm/.ready
# Absolute, because the servers that the tests start run in folders of their own.
COVERAGE := COVERAGE_FILE=$(CURDIR)/.coverage/data $(BIN)/coverage
# The tests run 95 %. Processes that tests kill may not say what they ran.
COVERED_PERCENT := 94

.PHONY: serve test test-hostile test-wheels check bench bench-gpu demo-model real-model page-picture clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(TORCH_FOR_CPU): | $(BIN)/python
	@! test -e $(SERVING) || echo '$(VENV) has a torch already, which stays: remove $(VENV) to have the small one.'
	@echo 'Installing torch for a CPU: 2 packages, 0.6 GB.'
	PIP_INDEX_URL=$(TORCH_INDEX) UV_DEFAULT_INDEX=$(TORCH_INDEX) $(INSTALL) --no-deps torch torchvision
	touch $@

$(SERVING): pyproject.toml constraints.txt | $(BIN)/python $(CHOSEN_TORCH)
	@echo 'Installing what serving needs: 65 packages, $(SERVING_SIZE). This takes one to five minutes.'
	$(INSTALL) --editable .
	touch $@

$(READY): pyproject.toml constraints.txt | $(BIN)/python $(CHOSEN_TORCH)
	@echo 'Installing what tests need: 192 packages, 1 GB more than serving. This takes one to six minutes.'
	$(INSTALL) --editable '.[dev]'
	touch $(SERVING) $@

$(PROGRAMS_READY): Makefile tests/bring_programs.sh $(READY)
	tests/bring_programs.sh $(@D) $(PROGRAMS)
	touch $@

$(NPM_READY): tests/typescript/package.json tests/typescript/package-lock.json | $(BIN)/python
	mkdir -p $(@D)
	cp $^ $(@D)
	! command -v npm || (cd $(@D) && npm ci)
	touch $@

serve: $(SERVING)
	$(BIN)/etenet package $(CHECKPOINT)
	exec $(BIN)/etenet serve --config $(CONFIG)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	-$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

test: check $(PROGRAMS_READY) $(NPM_READY)
	rm -rf .coverage && mkdir .coverage
	$(COVERAGE) run -m pytest --numprocesses 2 --max-worker-restart 0 --dist loadfile -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true
	$(COVERAGE) combine --quiet
	$(COVERAGE) report --fail-under=$(COVERED_PERCENT)

test-hostile: $(READY) $(PROGRAMS_READY) $(NPM_READY)
	$(BIN)/pytest --hostile -m 'long or thorough' -rP

test-wheels: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.wheels check $(if $(PYTHONS),--python $(PYTHONS)) $(if $(EXTRAS),--extras)

bench: $(READY)
	@test -n "$$ETENET_REFERENCE_DATA" || { echo "Set ETENET_REFERENCE_DATA to a folder with clips in msvd/clips and msrvtt/clips: real clips are decoded."; exit 2; }
	for name in decode encoder search server saturation neighbours scale jobs capacity; do $(BIN)/python -m benchmarks.$$name || exit 1; done

bench-gpu: $(READY)
	for name in gpu training; do $(BIN)/python -m benchmarks.$$name || exit 1; done

demo-model: $(READY)
	$(BIN)/python -m training.prepare demo --out $(DEMO_DATA)
	$(BIN)/python -m training.stills demo --data $(DEMO_DATA) --out $(DEMO_RUN)/encoder.pt
	$(BIN)/python -m training.train demo --stage 1 --resume --data $(DEMO_DATA) --out $(DEMO_RUN) --encoder-weights $(DEMO_RUN)/encoder.pt
	$(BIN)/python -m training.train demo --stage 2 --resume --data $(DEMO_DATA) --out $(DEMO_RUN)
	$(BIN)/python -m training.ship --run $(DEMO_RUN) --data $(DEMO_DATA) --terms 'Apache-2.0, made from rendered clips'

# Real frames of MSR-VTT, and photographs of Flickr8k at a tenth of their weight. The whole clips, and all that shares a
# source with them, are kept out.
MSRVTT := $(REFERENCE)/msrvtt
PREPARE_REAL := $(BIN)/python -m training.prepare frames --encoder timm:tf_efficientnet_lite2+timm:tf_efficientnet_lite1+timm:tf_efficientnet_lite0 --minimum-count 5 --max-words 16
REAL_TERMS := 'for research only, as MSR-VTT and Flickr8k are research data (model_store/MODEL_CARD.md)'
TRAIN_REAL := $(BIN)/python -m training.train real --resume --data $(REAL_DATA)/msrvtt --data $(REAL_DATA)/flickr8k=0.1 --out $(REAL_RUN)

real-model: $(READY)
	mkdir -p $(REAL_DATA)
	$(BIN)/python -c 'import json, sys; print(*(clip["vid"] for clip in json.load(sys.stdin).values()), sep="\n")' < $(REFERENCE)/clips_captions.json > $(REAL_DATA)/whole_clips.txt
	$(PREPARE_REAL) --frames $(MSRVTT)/frames/train.tar $(MSRVTT)/frames/validate.tar $(MSRVTT)/frames/test.tar --annotations $(MSRVTT)/train_val_annotation.zip $(MSRVTT)/test_videodatainfo.json.zip --exclude $(REAL_DATA)/whole_clips.txt --allow-missing --out $(REAL_DATA)/msrvtt
	$(PREPARE_REAL) --frames $(REFERENCE)/flickr8k/images.tar --captions $(REFERENCE)/flickr8k/captions.json --validation-share 0 --test-share 0 --out $(REAL_DATA)/flickr8k
	$(TRAIN_REAL) --stage 1
	$(TRAIN_REAL) --stage 3
	$(BIN)/python -m training.ship --run $(REAL_RUN) --checkpoint model_store/real.pt --max-bytes 45000000 --start-share 0.45 --terms $(REAL_TERMS)
	$(BIN)/python -m training.calibrate --checkpoint model_store/real.pt --data $(REAL_DATA)/msrvtt --tokenizer none --minimum-risk --test-split test --features $(REAL_RUN)/test/features --figure $(REAL_RUN)/reliability.png --out model_store/real.pt
	$(BIN)/python -m training.evaluate --checkpoint model_store/real.pt --beside $(REAL_RUN)/stage1/best.pt --data $(REAL_DATA)/msrvtt --split test --tokenizer none --out $(REAL_RUN)/test

page-picture: $(PROGRAMS_READY)
	$(BIN)/python -m tests.page_picture

clean:
	rm -rf $(DEMO_DATA) $(DEMO_RUN) $(REAL_DATA) $(REAL_RUN) model_store/etenet.mar .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
