.DEFAULT_GOAL := help
unexport PYTHONDONTWRITEBYTECODE # or each process compiles every package anew
PYTHON ?= python3
VENV := .venv
COMMAND := $(VENV)/bin/image-to-prompts

help: ## this list
	@awk -F ':.*## ' '/^## / {print "\n" substr($$0, 4)} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

## Use it

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed ## virtual environment .venv with everything in it

run: install ## the embedded chain on about 3,000 prompts: pictures, model, submission, score (10 to 25 minutes)
	$(COMMAND) run

quick: install ## the same on a few hundred prompts (1 to 4 minutes)
	$(COMMAND) run --quick

## Work on it

fix: install ## format
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .

check: install ## lint and types
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

test: install ## all tests that this machine can run (python -m pytest alone: the fast ones)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not gpu and not network and not rehearsal'

test-kaggle: install ## the fast tests with pandas and numpy of Kaggle's image, everything else as in .venv
	$(PYTHON) -m venv .venv-kaggle
	.venv-kaggle/bin/python -m pip install --quiet 'pandas==2.2.3' 'numpy==2.0.*'
	$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'), '$(CURDIR)', sep='\n')" \
		> $$(.venv-kaggle/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz-shared.pth
	.venv-kaggle/bin/python -m pytest -n 2

notebooks: install ## build and execute the notebooks on the embedded profile
	$(VENV)/bin/python notebooks/build.py notebooks

kernels: install ## build the Kaggle kernels from the notebooks' sources
	$(VENV)/bin/python notebooks/build.py kernels

docs: install ## the documentation as a site in site/, every link checked
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

## Longer checks

coverage: install ## all tests, and the lines that they leave out; fails below 90.8 %
	PYTEST_ADDOPTS="--cov=image_to_prompts --cov-branch --cov-report=term:skip-covered --cov-fail-under=90.8" $(MAKE) test

chaos: install ## the failure suite in full, about half an hour; writes docs/reliability.md
	$(VENV)/bin/python -m pytest -n 2 -m chaos --rounds=8 --reliability=docs/reliability.md

PRELOADED := accelerate diffusers faiss matplotlib.pyplot open_clip polars pyarrow scipy.optimize sentence_transformers sklearn.pipeline sympy timm
MODULES := models.doubt training.dataset models.metrics data.metadata search.nearest search.groups infer.submission training.loop training.epochs training.state search.near_pairs dedupe.result embedded.ceiling
FUNCTIONS := data.images.x_join predict.predictors.x_blend_weights predict.blend.x_fitted predict.predictors.x__predict_block render.stable_diffusion.xǁStableDiffusionBackendǁcall
mutants: install ## one-line faults where they cost most, and which of them no test notices (two hours)
	rm -rf mutants
	PYTEST_ADDOPTS="-p no:unraisableexception -p no:threadexception -p no:xdist" \
		PRELOADED="$(PRELOADED)" HYPOTHESIS_EXAMPLES=10 OMP_NUM_THREADS=1 $(VENV)/bin/mutmut run --max-children 2 \
		$(MODULES:%='image_to_prompts.%.*') $(FUNCTIONS:%='image_to_prompts.%__mutmut_*')
	$(VENV)/bin/python tests/mutants_report.py && tail -n 16 docs/reliability.md

ROOM ?= /tmp/rehearsal
KAGGLE_PYTHON ?= python3.12
rehearse: install ## every reference model and stage at full size, and the kernels with Kaggle's versions (an hour, 25 GB in ROOM)
	mkdir -p $(ROOM)/kaggle
	$(VENV)/bin/python tools/rehearsal.py $(ROOM)/models --out docs/rehearsal.md
	$(VENV)/bin/python tools/rehearse_stages.py $(ROOM)/stages --out docs/rehearsal.md
	REHEARSAL_PYTHON=$(KAGGLE_PYTHON) REHEARSAL_TORCH='torch==2.10.* torchvision==0.25.*' REHEARSAL_FOLDER=$(ROOM)/kaggle \
		$(VENV)/bin/python -m pytest tests/kaggle/test_rehearsal.py -m rehearsal

release-check: install ## builds the wheel and tries it in empty environments: three Pythons (in PATH or downloaded), lowest versions (half an hour, 12 GB in ROOM)
	$(VENV)/bin/python -m pip install --quiet uv
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH UV_CACHE_DIR=$(ROOM)/uv $(VENV)/bin/python tools/release_check.py $(ROOM)/release
	$(MAKE) docs

bench: install ## speed on this machine, beside plain versions of the same (an hour); prints a table and puts it into the docs
	$(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt -e '.[bench]'
	for part in render "finetune step" infer encode "dedupe real" "ensemble epoch" embed; do \
		$(VENV)/bin/python benchmarks/$${part%% *}.py $$(echo "$$part " | cut -d ' ' -f 2) || exit 1; done
	$(PYTHON) benchmarks/table.py

bench-table: ## put the figures that benchmarks wrote, those of a GPU too, into docs/performance.md
	$(PYTHON) benchmarks/table.py

.PHONY: help install check run quick test test-kaggle coverage chaos mutants rehearse release-check bench bench-table notebooks kernels docs fix
