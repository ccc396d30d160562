# Two commands do everything on a machine with Python 3.11 or 3.12: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
MAX_SECONDS ?= 540
PRECISION ?= bf16
BIN := $(VENV)/bin
export OMP_NUM_THREADS := 1

.PHONY: help demo test test-all bench bench-quick lint format install install-dev results paper wheelhouse image \
	containers containers-quick clean

help:           ## print the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch and torchvision in one install: a pair from two indexes does not fit together.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/installed

install: $(VENV)/installed           ## make the environment and install fedcil
install-dev: $(VENV)/installed-dev   ## the same with the development extras

demo: install    ## FedAvg, MFCL and oracle on handwritten digits: a table, run folders, pictures
	$(BIN)/fedcil run digits_fedavg digits_mfcl digits_oracle --output runs/demo --figure runs/demo/comparison.png

lint: install-dev    ## lint, format check, strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev  ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint           ## lint, format, types and the fast tests
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-all: lint       ## everything: all engines, kills, real data
	$(BIN)/python -m pytest -n 3 --dist worksteal --durations 20

bench: install       ## every benchmark with its peers (half an hour and more); prints the path of the JSON last
	$(BIN)/python -m scenarios.benchmarks

bench-quick: install ## the client step, a round and the engine in small, under 4 minutes
	$(BIN)/python -m scenarios.benchmarks --quick --repeats 3

results: install     ## the tables of docs/results.md, resumable
	$(BIN)/python scenarios/results.py

paper: install       ## the protocol of the MFCL paper on CIFAR-100, a GPU's work; resumable (MAX_SECONDS=540 PRECISION=bf16)
	$(BIN)/python scenarios/results.py paper --jobs 1 --max-seconds $(MAX_SECONDS) --set training.precision=$(PRECISION)

# For an image without CUDA: TORCH="torch==<release>" where pip finds a CPU build, or PIP_ARGS with its index.
TORCH ?=
BASE_IMAGE ?= python:3.11-slim
FEDCIL_IMAGE ?= fedcil:dev

wheelhouse:          ## fetch what the image needs, so that its build needs no network
	$(PYTHON) -m pip download --quiet --disable-pip-version-check -d deploy/wheelhouse $(PIP_ARGS) \
		$(TORCH) -r deploy/requirements.txt

image: wheelhouse    ## the one image of all roles
	docker build --quiet --tag $(FEDCIL_IMAGE) --build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg PIP_ARGS=--no-index .

containers: install image        ## the compose file under faults, about eight minutes; needs a Docker engine
	$(BIN)/python -m scenarios.reliability.containers

containers-quick: install image  ## up, train, one crash, down
	$(BIN)/python -m scenarios.reliability.containers --quick

clean:               ## remove the environment and the runs
	rm -rf $(VENV) runs dist
