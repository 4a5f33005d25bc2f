# The two commands of the README: `make demo` and `make test`. Each says what it does, and does nothing twice.

PYTHON ?= python3
VENV := .venv
OPS := .venv-ops
CHECKOV := .venv-checkov
DOCS := .venv-docs
PY := $(VENV)/bin/python
DEMO := -c config/config_demo.json -e config/environment_demo.json
SCRATCH := -c config/config_demo.json -e config/environment_demo_scratch.json
WEIGHTS := checkpoints/demo
NUM_PHANTOMS := 420
# Another clone, where `make demo` or `make demo-scratch` was run, for the pictures of these.
TREE := .

.PHONY: help demo demo-scratch sample serve notebook figures bench bench-gpu lint test docs check-ops test-ops audit clean

help:
	@echo "make demo          train on the embedded data from the demo weights, sample, evaluate (about 10 minutes)"
	@echo "make demo-scratch  make the demo weights from nothing (up to 2 hours on 2 cores)"
	@echo "make sample        generate 4 brains with the demo weights (under 3 minutes)"
	@echo "make serve         the service with the demo weights, and its page, at http://127.0.0.1:8000/"
	@echo "make notebook      the tutorial 3d_ldm_tutorial.ipynb in JupyterLab"
	@echo "make figures       draw the pictures in figs (a minute, where packages are installed)"
	@echo "make bench         speed and memory against the reference recipe, on a CPU (under 10 minutes)"
	@echo "make bench-gpu     the same on one GPU (under 10 minutes)"
	@echo "make test          linters, types and the whole test suite"
	@echo "make docs          build the documentation site, in site/ (under 2 minutes)"
	@echo "make check-ops     judge containers, manifests, pipelines, rules with the programs that read them (2 minutes)"
	@echo "make test-ops      run them for real, as far as this machine has what they need"
	@echo "make audit         known weaknesses of the packages in the container images (needs a network)"
	@echo "make clean         remove what the demo has made, except the data set and the environment"

$(VENV)/run: requirements.txt
	@echo "== environment: $(VENV), with requirements.txt (the first time some minutes; pip is silent)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/service: requirements-service.txt $(VENV)/run
	@echo "== environment: $(VENV), with requirements-service.txt"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-service.txt
	@touch $@

$(VENV)/notebook: requirements-notebook.txt $(VENV)/run
	@echo "== environment: $(VENV), with requirements-notebook.txt"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-notebook.txt
	@touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/service
	@echo "== environment: $(VENV), with requirements-dev.txt"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@# The older package, whose weights must load; it pins an older monai, so it comes without what it asks for.
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps monai-generative==0.2.3
	@touch $@

data/phantom/Task01_BrainTumour/dataset.json: | $(VENV)/run
	@echo "== data: $(NUM_PHANTOMS) embedded brains with tumours"
	@$(PY) download_brats_data.py -e config/environment_demo.json --phantom $(NUM_PHANTOMS)

demo: $(VENV)/run data/phantom/Task01_BrainTumour/dataset.json
	@echo "== stage 1: the autoencoder, going on from the demo weights in $(WEIGHTS)"
	@$(PY) train_autoencoder.py $(DEMO) --init-from $(WEIGHTS) --overwrite
	@echo "== stage 2: the diffusion model, going on from the demo weights in $(WEIGHTS)"
	@$(PY) train_diffusion.py $(DEMO) --init-from $(WEIGHTS) --overwrite
	@echo "== stage 3: 8 new brains"
	@$(PY) inference.py $(DEMO) --num 8
	@echo "== stage 4: how good they are"
	@$(PY) evaluate.py $(DEMO) --synthetic results/demo --output results/demo/metrics.json
	@echo "== look at results/demo/montage.png (the 8 brains) and results/demo/metrics.png (beside real ones);"
	@echo "   figures are in results/demo/metrics.json, training curves in: $(VENV)/bin/tensorboard --logdir runs/demo"

# How the committed weights were made. Longer than the demo, otherwise the same.
demo-scratch: $(VENV)/run data/phantom/Task01_BrainTumour/dataset.json
	@echo "== stage 1 from nothing"
	@$(PY) train_autoencoder.py $(SCRATCH) --overwrite \
	  --set autoencoder_train.max_epochs=12 --set autoencoder_train.lr=1e-3 --set autoencoder_train.val_interval=4
	@echo "== stage 2 from nothing"
	@$(PY) train_diffusion.py $(SCRATCH) --overwrite \
	  --set diffusion_train.max_epochs=110 --set diffusion_train.lr=1.5e-3 --set diffusion_train.val_interval=10
	@$(PY) inference.py $(SCRATCH) --num 8
	@$(PY) evaluate.py $(SCRATCH) --synthetic results/demo_scratch --output results/demo_scratch/metrics.json
	@echo "== weights are in checkpoints/demo_scratch, pictures in results/demo_scratch"

sample: $(VENV)/run
	@echo "== 4 brains with the demo weights in $(WEIGHTS)"
	@$(PY) inference.py -c config/config_demo.json -e config/environment_sample.json --num 4

results/sample/synimg_0_3.nii.gz: $(WEIGHTS)/autoencoder.safetensors $(WEIGHTS)/diffusion_unet.safetensors
	@$(MAKE) --no-print-directory sample

# Curves and demo's pictures are renewed where there are whole runs; else they are drawn from what is kept beside them.
figures: $(VENV)/dev results/sample/synimg_0_3.nii.gz
	@echo "== pictures"
	@$(PY) -m figs --tree $(TREE)
	@$(PY) -m benchmarks.plot > /dev/null
	@echo "== they are in figs; figs/README.md says what each shows"

serve: $(VENV)/service
	@exec $(PY) mlops/docker/api_server.py

notebook: $(VENV)/notebook
	@exec $(VENV)/bin/jupyter lab 3d_ldm_tutorial.ipynb

bench: $(VENV)/dev
	@for part in train_step sampling data loss growth plot; do \
	  echo "== benchmarks.$$part"; $(PY) -W ignore -m benchmarks.$$part || exit 1; done
	@echo "== results are in benchmarks/results, the plot is figs/speed.png"

bench-gpu: $(VENV)/dev
	@$(PY) -W ignore -m benchmarks.gpu
	@$(PY) -m benchmarks.plot

lint: $(VENV)/dev
	@echo "== linters and types"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

test: lint
	@echo "== tests"
	@# Each process takes half of the files, and helps the other at the end: what a file prepares is made once.
	@$(PY) -m pytest -n 2 --dist worksteal

$(DOCS)/run: requirements-docs.txt
	@echo "== environment: $(DOCS), with requirements-docs.txt"
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

# Not --quiet, which hides warnings from --strict too. The variable silences advertising for successors of MkDocs.
docs: $(DOCS)/run
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo "== open site/index.html in a browser; no server is needed"

$(OPS)/run: requirements-ops.txt
	@echo "== environment: $(OPS), with requirements-ops.txt"
	@test -x $(OPS)/bin/python || $(PYTHON) -m venv $(OPS)
	@$(OPS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-ops.txt
	@touch $@

# It asks for versions that nothing else can live with.
$(CHECKOV)/run:
	@echo "== environment: $(CHECKOV), for checkov"
	@test -x $(CHECKOV)/bin/python || $(PYTHON) -m venv $(CHECKOV)
	@$(CHECKOV)/bin/python -m pip install --quiet --disable-pip-version-check checkov==3.3.30
	@touch $@

# The inference server and MLflow ask for older packages than the service has, and not for the same.
.venv-azure/run: PACKAGE = azureml-inference-server-http==1.5.1
.venv-mlflow/run: PACKAGE = mlflow==3.17.2
.venv-azure/run .venv-mlflow/run: $(VENV)/dev
	@echo "== environment: $(@D), $(PACKAGE) on top of $(VENV)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/ldm3d.pth
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts $(PACKAGE)
	@touch $@

check-ops: $(OPS)/run $(CHECKOV)/run
	@echo "== the operational files, read by the programs that they are for"
	@$(OPS)/bin/python -m pytest -n 2 tests_ops/static

test-ops: $(OPS)/run $(VENV)/dev .venv-azure/run .venv-mlflow/run
	@echo "== the operational files, run"
	@$(OPS)/bin/python -m pytest -rs tests_ops/real

# The lock of the larger image, which has every package of the smaller one. What cannot be looked up is a failure.
audit: $(OPS)/run
	@echo "== known weaknesses of packages"
	@$(OPS)/bin/pip-audit --strict --disable-pip --require-hashes -r mlops/docker/locks/cuda-py3.11.txt

clean:
	rm -rf results/demo results/demo_scratch results/sample results/tutorial runs/demo runs/demo_scratch \
	  checkpoints/demo_run checkpoints/demo_scratch data/phantom/cache
