# make demo   trains on real photographs, scores them all, asks a question in SQL, writes a report
# make test   runs all tests
# make lint   style and types
# make docs   builds the docs site in build/docs

PYTHON ?= python3
ENV := .venv
BIN := $(ENV)/bin

$(ENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.PHONY: demo test lint docs clean
demo: $(ENV)/installed
	$(BIN)/python -m csflow.demo cells demo/cells
	$(BIN)/python jobs/train.py --input demo/cells/functional/train --output demo/model --overwrite \
	    --hidden_channels 128 --learning_rate 1e-3 --epochs 6
	$(BIN)/python jobs/score.py --model demo/model --input demo/cells --output demo/scores
	$(BIN)/python jobs/evaluate.py --scores demo/scores --labels demo/cells/labels.csv
	$(BIN)/python -m csflow.demo query demo/scores
	$(BIN)/python jobs/report.py --scores demo/scores --output demo/report.html

test: $(ENV)/installed
	$(BIN)/python -m pytest

lint: $(ENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(ENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going docs build/docs

clean:
	rm -rf $(ENV) demo
