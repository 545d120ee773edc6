#!/bin/sh
# Installs what the model "@NAME@" needs into an environment beside this file, and tests the model.
# PYTHON chooses the interpreter, VENV the place of the environment, PIP_ARGS is given to pip.
set -eu
here=$(CDPATH='' cd "$(dirname "$0")" && pwd -P)
python=${PYTHON:-python3}
venv=${VENV:-$(dirname "$here")/@NAME@-venv}
venv=$("$python" -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$venv")
case $venv/ in
  "$here"/*) echo "install.sh: VENV is $venv, which lies in this folder; give another place" >&2; exit 1 ;;
esac
cd "$here"
[ "$(getconf LONG_BIT)" = 64 ] || { echo "install.sh: install the 64-bit Raspberry Pi OS" >&2; exit 1; }
"$python" -m venv "$venv"
# shellcheck disable=SC2086
"$venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes ${PIP_ARGS:-} \
  -r requirements.txt
PYTHONDONTWRITEBYTECODE=1 "$venv/bin/python" run.py --check
echo "use it with: $venv/bin/python run.py in.npz out.npz"
