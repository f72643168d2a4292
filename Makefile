# make demo   builds .venv with what generation needs and writes text with the bundled model
# make test   installs the development requirements as well and runs the tests
# make check  lint, format, types and tests: what a change must pass
# make sizes  lines of every Python file, those beyond the budget marked
# make format rewrites the code the way `make check` wants it

PYTHON ?= python3
BUDGET ?= 200
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c requirements/constraints.txt
PINS := pyproject.toml requirements/generate.txt requirements/constraints.txt

.PHONY: demo test check sizes format clean

demo: .venv/generate.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" ./deepy.py generate.py configs/tiny.yml -i examples/prompts.txt

test: .venv/develop.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" pytest -n auto --dist loadfile

check: .venv/develop.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	PATH="$(CURDIR)/$(BIN):$$PATH" pytest -n auto --dist loadfile

sizes:
	@find . -name '*.py' -not -path './.venv/*' -not -path './build/*' | xargs wc -l | sort -rn \
	  | awk '$$2 != "total" { print $$0 ($$1 > $(BUDGET) ? "   over $(BUDGET)" : "") }'

format: .venv/develop.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamps make a second call instant; a change of the requirements makes the next call install again.
.venv/generate.stamp: $(PINS) | $(BIN)/pip
	$(INSTALL) -e .
	@touch $@

.venv/develop.stamp: $(PINS) requirements/requirements.txt requirements/requirements-dev.txt | $(BIN)/pip
	$(INSTALL) -r requirements/requirements-dev.txt -e .
	@touch $@ .venv/generate.stamp

$(BIN)/pip:
	$(PYTHON) -m venv .venv
