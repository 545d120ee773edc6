#!/bin/sh
# Installs what the model "@NAME@" needs into an environment beside this file, and tests the model.
# PYTHON chooses the interpreter, PIP_ARGS is given to pip.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
venv=${VENV:-$(dirname "$PWD")/@NAME@-venv}
[ "$(getconf LONG_BIT)" = 64 ] || { echo "install.sh: install the 64-bit Raspberry Pi OS" >&2; exit 1; }
"$python" -m venv "$venv"
# shellcheck disable=SC2086
"$venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes ${PIP_ARGS:-} \
  -r requirements.txt
PYTHONDONTWRITEBYTECODE=1 "$venv/bin/python" run.py --check
echo "use it with: $venv/bin/python run.py in.npz out.npz"
