#!/usr/bin/env bash
# From a bare clone to a comparison of U2PL with its supervised baseline, on a
# CPU, in about ten minutes:
#
#   bash scripts/demo.sh
#
# Both runs take the same number of updates. Interrupted, the same command goes
# on where it stopped; finished, it only prints the table again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

prepare_venv
cd "$ROOT"
"$VENV_PYTHON" -m u2pl_jax.main \
  --config=configs/shapes.py:method=supervised \
  --workdir=runs/shapes_supervised
"$VENV_PYTHON" -m u2pl_jax.main \
  --config=configs/shapes.py \
  --workdir=runs/shapes
"$VENV_PYTHON" scripts/demo_table.py \
  runs/shapes_supervised runs/shapes --output=runs/comparison
