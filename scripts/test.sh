#!/usr/bin/env bash
# Lint, format and tests, from a bare clone:
#
#   bash scripts/test.sh [--slow] [pytest arguments]
#
# Tests marked slow run with --slow, or where CI is set. Two processes share the
# tests, file by file; -n0 runs them in one, as --pdb needs it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

slow="${CI:+yes}"
arguments=()
for argument in "$@"; do
  if [[ "$argument" == "--slow" ]]; then
    slow=yes
  else
    arguments+=("$argument")
  fi
done
# Before the caller's arguments: their -m, if any, is the one that counts.
if [[ -z "$slow" ]]; then
  arguments=(-m "not slow" ${arguments[@]+"${arguments[@]}"})
fi

prepare_venv test
# Paths among the arguments are the caller's only in the repository root.
cd "$ROOT"
"$VENV_PYTHON" -m ruff check --quiet .
"$VENV_PYTHON" -m ruff format --quiet --diff .
# With the reasons of what is skipped, such as a browser that is not installed.
# By file, whose fixtures are then set up once; tests/conftest.py has the order.
exec "$VENV_PYTHON" -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder \
  ${arguments[@]+"${arguments[@]}"}
