#!/bin/sh
# Installs the model "@NAME@" on a Raspberry Pi, and starts its server at every boot.
#
#   sudo ./install.sh     into /opt/@NAME@, with a service of its own
#   ./install.sh          into ~/.local/share/@NAME@, without a service
#
# PREFIX=/somewhere ./install.sh chooses another place. PYTHON chooses the interpreter.
# PIP_ARGS is given to pip, such as "--no-index --find-links /media/usb/wheels" without a network.
set -eu
umask 022
here=$(CDPATH='' cd "$(dirname "$0")" && pwd -P)

fail() {
  echo "install.sh: $*" >&2
  exit 1
}

python=${PYTHON:-python3}
command -v "$python" > /dev/null || fail "there is no $python; install it with: sudo apt install python3-venv"
[ "$(getconf LONG_BIT)" = 64 ] || fail "this system has 32 bits; install the 64-bit Raspberry Pi OS"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
  fail "$("$python" -V) is not supported; Python 3.11 to 3.13 are (set PYTHON)"

if [ "$(id -u)" = 0 ]; then
  prefix=${PREFIX:-/opt/@NAME@}
else
  prefix=${PREFIX:-$HOME/.local/share/@NAME@}
fi
prefix=$("$python" -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$prefix")
case $prefix/ in
  "$here"/*) fail "PREFIX is $prefix, which lies in this folder; give another place" ;;
esac
cd "$here"

echo "1/5 an environment in $prefix"
mkdir -p "$prefix"
"$python" -m venv "$prefix/venv" || fail "the environment could not be made; install: sudo apt install python3-venv"

echo "2/5 packages, each checked by its SHA-256"
# shellcheck disable=SC2086
"$prefix/venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes \
  ${PIP_ARGS:-} -r requirements.txt

package=$prefix/package
if [ "$here" != "$package" ]; then
  echo "3/5 the model"
  package=$prefix/package.new
  rm -rf "$package"
  cp -R "$here" "$package"
else
  echo "3/5 the model is in its place"
fi

export EDGEQ_CACHE="$prefix/cache"
mkdir -p "$EDGEQ_CACHE"
echo "4/5 kernels for this processor (a minute on a Pi 5, some on a Zero 2)"
"$prefix/venv/bin/edgeq" warmup > /dev/null

echo "5/5 the golden tests"
"$prefix/venv/bin/edgeq" package --verify "$package"
if [ "$package" != "$prefix/package" ]; then
  # an earlier version stays until this one has passed
  rm -rf "$prefix/package"
  mv "$package" "$prefix/package"
fi

if [ "$(id -u)" = 0 ] && [ "$prefix" = /opt/@NAME@ ] && [ -d /run/systemd/system ]; then
  id -u edgeq > /dev/null 2>&1 || useradd --system --no-create-home --shell /usr/sbin/nologin edgeq
  chown -R edgeq "$EDGEQ_CACHE"
  install -m 644 @NAME@.service /etc/systemd/system/@NAME@.service
  systemctl daemon-reload
  systemctl enable @NAME@.service
  systemctl restart @NAME@.service  # an earlier version may be running
  echo "started; see: systemctl status @NAME@"
else
  echo "start it with: $prefix/package/run.sh"
fi
