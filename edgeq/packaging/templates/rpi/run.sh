#!/bin/sh
# Serves the model "@NAME@" on http://127.0.0.1:8080, with OpenAI's interface and a chat page.
#
# Settings, as variables: HOST, PORT, CONTEXT (tokens), THREADS. To let other machines in, set
# HOST=0.0.0.0 and EDGEQ_SERVE_API_KEY to a key of your choice.
set -eu
here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
prefix=${PREFIX:-$(dirname "$here")}
export EDGEQ_CACHE="${EDGEQ_CACHE:-$prefix/cache}"
exec "$prefix/venv/bin/edgeq" serve "@NAME@=$here/@ENTRY@" \
  --host "${HOST:-127.0.0.1}" --port "${PORT:-8080}" \
  --ctx-size "${CONTEXT:-@CONTEXT@}" --parallel 1 --cache-ram @PREFIX_MIB@ \
  ${THREADS:+--threads "$THREADS"} "$@"
