# make demo    prepare a small corpus offline and train the limited track on it, with every technique, at toy size
# make test    style, the records' tables, the list of instruments, and tests
# Both set up their own virtual environment in .venv first. PYTHON=/path/to/python3.12 chooses the Python.

VENV := .venv
NEWEST := $(foreach v,3 3.14 3.13 3.12 3.11,python$(v))
PYTHON ?= $(firstword $(foreach p,$(NEWEST),$(shell $(p) -c 'import sys; print("$(p)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))

.PHONY: demo test clean

demo: $(VENV)/requirements.txt
	$(VENV)/bin/python prepare_data.py --source demo
	OMP_NUM_THREADS=1 $(VENV)/bin/python train.py --demo  # the model is tiny: more threads would wait for each other

test: $(VENV)/tests-requirements.txt
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python records/leaderboard.py --check
	$(VENV)/bin/python records/instruments.py --check
	$(VENV)/bin/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal

clean:
	rm -rf $(VENV) demo_data .pytest_cache .ruff_cache

# The copies in .venv say what is installed there: made when the installation has succeeded.
$(VENV)/requirements.txt: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	cp requirements.txt $@

$(VENV)/tests-requirements.txt: tests/requirements.txt $(VENV)/requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	cp tests/requirements.txt $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: install one, or name it with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
