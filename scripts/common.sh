# Sourced by the scripts beside it: finds the repository and makes .venv.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"

die() {
  echo "error: $*" >&2
  exit 1
}

supported_python() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    2>/dev/null
}

# Prints an interpreter that the pins have wheels for; $PYTHON alone if set.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if supported_python "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  candidate="${PYTHON:-python3}"
  die "no Python 3.11 to 3.13 found ($candidate is" \
    "'$("$candidate" --version 2>&1 || true)'); install one, or name it:" \
    "PYTHON=/path/to/python3.12 bash $0"
}

make_venv() {
  local python
  python="$(find_python)" || exit 1
  echo "Creating .venv ($("$python" --version))"
  "$python" -m venv "$VENV" || {
    rm -rf "$VENV"
    die "$python cannot make an environment; on Debian and Ubuntu:" \
      "apt-get install python3-venv"
  }
}

requirements_hash() {
  # Python, since shasum and sha256sum exist on some systems only. The version
  # counts too: what is installed belongs to it.
  "$VENV_PYTHON" - "$1" <<'PYTHON_END'
import hashlib, pathlib, sys
text = sys.version.encode() + pathlib.Path(sys.argv[1]).read_bytes()
print(hashlib.sha256(text).hexdigest())
PYTHON_END
}

# install_if_changed FILE [pip arguments]: does nothing, and says nothing, while
# the file is what was installed last.
install_if_changed() {
  local file="$1" name stamp wanted
  shift
  name="$(basename "$file")"
  stamp="$VENV/.installed-$name"
  wanted="$(requirements_hash "$file")"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
    return
  fi
  echo "Installing $name (the first time takes some minutes)"
  touch "$VENV/.installing"
  rm -f "$stamp"
  "$VENV_PYTHON" -m pip install -qq --no-input --disable-pip-version-check \
    -r "$file" "$@" || die "could not install $name; see above"
  echo "$wanted" > "$stamp"
  rm -f "$VENV/.installing"
}

prepare_venv_locked() {
  # A package that an interrupted pip left by half passes for installed: only a
  # new environment is sure to be whole.
  if [[ -f "$VENV/.installing" ]]; then
    echo "The last installation did not finish: starting again"
    rm -rf "$VENV"
  fi
  if ! "$VENV_PYTHON" -m pip --version > /dev/null 2>&1; then
    rm -rf "$VENV"
    make_venv
  fi
  supported_python "$VENV_PYTHON" ||
    die "$VENV is made with $("$VENV_PYTHON" --version), but 3.11 to 3.13 is" \
      "needed; remove it and run this again"
  install_if_changed "$ROOT/requirements.txt"
  if [[ "${1:-}" == "test" ]]; then
    install_if_changed "$ROOT/requirements-test.txt" \
      -c "$ROOT/requirements.txt"
  fi
}

# prepare_venv [test]: .venv with the pinned packages, and those of the tests.
prepare_venv() {
  # One at a time, where the system has flock. The lock is held in a subshell:
  # what runs later must not inherit it.
  (
    if command -v flock > /dev/null; then
      exec 9> "$ROOT/.venv.lock"
      flock 9
    fi
    prepare_venv_locked "$@"
  ) || exit 1
}
