# make demo: set up, then the main job on the embedded data.   make test: set up, then all tests.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
AOT_STAMP := .venv-aot/.installed
NEWEST := .venv-newest/bin
TIMES := .test-times
DEMO := runs/demo
STUDY := runs/digits-study
OBJECTIVES := runs/digits-objectives
TEXT := runs/digits-text
FASHION := runs/fashion
# Small models on a CPU are fastest with one thread each and the models in parallel.
export OMP_NUM_THREADS ?= 1
# Tests start many processes, which would compile each module anew.
unexport PYTHONDONTWRITEBYTECODE
# Two compute on two cores while one waits.
TEST_WORKERS ?= 3
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable

.PHONY: demo study objectives text fashion test test-newest test-gpu browser slurm lint format bench soak aot clean

$(STAMP): setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev,pinned]' --constraint constraints.txt
	touch $@

demo: $(STAMP)
	$(BIN)/ditscale encode data=digits
	$(BIN)/ditscale train -m experiment=demo
	$(BIN)/ditscale sample checkpoint=$(DEMO)/d64-n4-p2-adaln_zero-seed0 sampler.steps=50 out=$(DEMO)/samples
	$(BIN)/ditscale report sweep=$(DEMO)

# A sweep over sizes x patches x blocks on digits, with figure 10's sampling steps, and its report.
study: $(STAMP)
	$(BIN)/ditscale encode data=digits
	$(BIN)/ditscale train -m experiment=demo/study
	$(BIN)/ditscale evaluate -m runtime=cpu sampler.steps=5,10,40 evaluation.num_images=500 \
		checkpoint=$$(ls -d $(STUDY)/*adaln_zero* | paste -sd,)
	$(BIN)/ditscale report sweep=$(STUDY) runtime=cpu sampler.steps=20

# Seven objectives with one network, three seeds, at 4 to 100 network calls, and their report (docs/objectives.md). The runs
# themselves measure at 50 calls.
EVALUATE_RUNS := $(BIN)/ditscale evaluate -m hydra/launcher=processes hydra.launcher.n_jobs=-1 runtime=cpu \
	evaluation.num_images=1000
objectives: $(STAMP)
	$(BIN)/ditscale encode data=digits
	$(BIN)/ditscale train -m experiment=demo/objectives
	$(EVALUATE_RUNS) diffusion/sampler=ddim sampler.steps=4,10,25,100 \
		checkpoint=$$(ls -d $(OBJECTIVES)/noise-* $(OBJECTIVES)/v-* $(OBJECTIVES)/min_snr-* | paste -sd,)
	$(EVALUATE_RUNS) diffusion/sampler=edm_heun sampler.steps=3,5,13,25,50 \
		checkpoint=$$(ls -d $(OBJECTIVES)/edm-* | paste -sd,)
	$(EVALUATE_RUNS) diffusion/sampler=euler sampler.steps=4,10,25,100 \
		checkpoint=$$(ls -d $(OBJECTIVES)/flow* $(OBJECTIVES)/edm-* | paste -sd,)
	$(BIN)/ditscale report sweep=$(OBJECTIVES) runtime=cpu sampler.steps=20

# Digits from captions, and how often each prompt is obeyed (docs/text.md).
text: $(STAMP)
	$(BIN)/ditscale encode data/captions=digits data/text_encoder=random data.shards=shards/digits_text
	$(BIN)/ditscale train experiment=demo/text
	$(BIN)/ditscale sample checkpoint=$(TEXT)/d64-n4-p4-adaln_zero_cross-seed0 num_images=24 \
		'prompts=[a drawing of a three,somebody wrote a 8,I want seven here]' diffusion/sampler=euler sampler.steps=20 \
		diffusion/guidance=classifier_free runtime=cpu precision=fp32 out=$(TEXT)/samples
	$(BIN)/ditscale report sweep=$(TEXT) diffusion/sampler=euler sampler.steps=20 diffusion/guidance=classifier_free runtime=cpu

# Five studies on Fashion-MNIST (Debian's package dataset-fashion-mnist), with three seeds each (docs/fashion.md). Kill it and
# start it again at will: runs continue at their checkpoints, evaluations at their chunks, and what is finished stays. On a GPU:
#   make fashion FASHION_ON='runtime=accelerate runtime.tf32=false runtime.compile=false evaluation.batch_size=1000' FASHION_JOBS=15
FASHION_ON ?= runtime=cpu
FASHION_JOBS ?= -1
FASHION_SAMPLED := d96-n3-p2 d64-n2-p7 # the largest and the smallest of scaling
FASHION_SHARED := $(foreach seed,0 1 2,d64-n3-p4-adaln_zero-seed$(seed)) # of scaling; blocks and unets would train them again
fashion: $(STAMP)
	@echo "Five studies on Fashion-MNIST: about 5.4 hours on two cores (scaling 3.5, sampling 0.5, blocks 0.4," \
		"objectives 0.6, unets 0.5), or ten minutes on a large GPU. Stop it at any time; make fashion continues."
	$(BIN)/ditscale encode data=fashion_mnist
	for study in scaling sampling blocks objectives unets; do \
		case $$study in blocks|unets) for run in $(FASHION_SHARED); do test -e $(FASHION)-$$study/$$run || { \
			mkdir -p $(FASHION)-$$study && rm -rf $(FASHION)-part && cp -R $(FASHION)-scaling/$$run $(FASHION)-part && \
			mv $(FASHION)-part $(FASHION)-$$study/$$run; } || exit; done;; esac; \
		$(BIN)/ditscale train -m experiment=fashion/$$study hydra.launcher.n_jobs=$(FASHION_JOBS) $(FASHION_ON) || exit; done
	test -e $(FASHION)-scaling/sampled || { $(BIN)/ditscale evaluate -m hydra/launcher=processes \
		hydra.launcher.n_jobs=$(FASHION_JOBS) evaluation=fashion_mnist evaluation.num_images=1000 evaluation.batch_size=20 \
		compile=where_possible sampler.steps=250,100,50,25,10,5 \
		checkpoint=$$(ls -d $(FASHION_SAMPLED:%=$(FASHION)-scaling/%-*) | paste -sd,) $(FASHION_ON) && touch $(FASHION)-scaling/sampled; }
	for study in scaling blocks objectives unets; do \
		$(BIN)/ditscale report sweep=$(FASHION)-$$study runtime=cpu sampler.steps=20 || exit; done

# Lint runs beside the tests. Says at the end where the time went, also where something failed.
test: $(STAMP) browser slurm
	@rm -rf $(TIMES); trap '$(BIN)/python tests/suite_times.py $(TIMES)' EXIT; set -x; \
	$(BIN)/python tests/suite_times.py $(TIMES) lint $(MAKE) --no-print-directory lint & lint=$$!; \
	$(BIN)/pytest tests/unit tests/runtime tests/smoke -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder \
		--times $(TIMES)/tests.json; tests=$$?; \
	wait $$lint && exit $$tests

# The unit layer on the newest release of everything, without constraints.txt. Tests of what holds torch or Pillow back (the extra
# pinned) are skipped and say so. Each call takes what has been released since.
test-newest:
	$(PYTHON) -m venv .venv-newest
	$(NEWEST)/pip install --quiet --upgrade pip
	$(NEWEST)/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	$(NEWEST)/pip freeze --exclude-editable > .venv-newest/versions.txt
	@grep -E '^(accelerate|diffusers|numpy|torch|transformers)==' .venv-newest/versions.txt
	$(NEWEST)/pytest tests/unit -n auto -rs

# On a machine with a GPU; elsewhere they are skipped. DITSCALE_GPU_TESTS_ON=cpu runs their bodies on the CPU.
test-gpu: $(STAMP)
	$(BIN)/pytest tests/gpu -n 0 -rs

# Tests open the report and the page of `serve` in a browser. Where none is and none can be installed, they are skipped.
browser:
	@for name in $(BROWSERS); do command -v $$name > /dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends chromium; \
	else false; fi || echo "No browser was installed: the tests that open pages in one will be skipped."

# Sweeps are tested on a SLURM of one node. Where it is not and cannot be installed, those tests are skipped and say so.
slurm:
	@PATH="$$PATH:/usr/sbin"; for name in munged slurmctld slurmd sbatch; do command -v $$name > /dev/null || missing=$$name; done; \
	[ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get -q update && \
		DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends \
		munge slurmctld slurmd slurm-client > /dev/null; } || \
	echo "SLURM was not installed: the tests that sweep on it will be skipped."

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.open_shards
	$(BIN)/python -m benchmarks.encode
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.step_bytes
	$(BIN)/python -m benchmarks.sample
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.start
	$(BIN)/python -m benchmarks.evaluate

# The tests that kill jobs and damage files, with many more kills and trials than `make test` has, and a result line each in
# benchmarks/results/; and more combinations of runtime, mode and network.
soak: $(STAMP)
	$(BIN)/python -m benchmarks.soak encode 50
	$(BIN)/python -m benchmarks.soak train 100
	$(BIN)/python -m benchmarks.soak files 1000
	DITSCALE_CASES=all $(BIN)/pytest tests/runtime/test_one_run.py -n 0

$(AOT_STAMP): requirements-aot.txt
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/pip install --quiet --requirement requirements-aot.txt
	touch $@

# The training step of XL/2 compiled for TPUs that are not there: docs/tpu.md. About an hour on 2 cores.
aot: $(STAMP) $(AOT_STAMP)
	.venv-aot/bin/python -m benchmarks.tpu_aot

# Runs and shards of the demo go; other runs and shards are yours to delete.
clean:
	rm -rf .venv .venv-aot .venv-newest $(DEMO) $(STUDY) $(OBJECTIVES) $(TEXT) shards/digits shards/digits_text .mypy_cache .ruff_cache .pytest_cache $(TIMES) .hypothesis *.egg-info
