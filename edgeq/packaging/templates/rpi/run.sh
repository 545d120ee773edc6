#!/bin/sh
# Serves the model "@NAME@" on http://127.0.0.1:8080, with OpenAI's interface and a chat page.
#
# It takes the largest of the tiers below whose memory is free now. Settings, as variables:
#   CONTEXT        tokens of prompt and answer together; free memory is not checked then
#   MODEL          path of the model's file in this folder, with CONTEXT
#   MEMORY_MIB     memory that the server may take, instead of what is free
#   THREADS, HOST, PORT
# To let other machines in, set HOST=0.0.0.0 and EDGEQ_SERVE_API_KEY to a key of your choice.
set -eu
here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
prefix=${PREFIX:-$(dirname "$here")}
export EDGEQ_CACHE="${EDGEQ_CACHE:-$prefix/cache}"
threads=@THREADS@
cores=$(nproc 2> /dev/null || echo "$threads")
[ "$cores" -ge "$threads" ] || threads=$cores

if [ -z "${CONTEXT:-}" ]; then
  free=${MEMORY_MIB:-$(awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo)}
  # memory in MiB, tokens of context, file: planned when this package was made, the most first
  while read -r needed tokens file; do
    least=$needed smallest=$tokens
    [ "$free" -ge "$needed" ] || continue
    CONTEXT=$tokens
    MODEL=$file
    break
  done << 'END'
@TIERS@
END
  if [ -z "${CONTEXT:-}" ]; then
    echo "run.sh: the model needs $least MiB of memory, and $free MiB are free. Stop other" \
      "programs, or set CONTEXT=$smallest to start it anyway." >&2
    exit 1
  fi
  echo "run.sh: $free MiB of memory are free; a context of $CONTEXT tokens, $MODEL" >&2
fi
exec "$prefix/venv/bin/edgeq" serve "@NAME@=$here/${MODEL:-@ENTRY@}" \
  --host "${HOST:-127.0.0.1}" --port "${PORT:-8080}" \
  --ctx-size "$CONTEXT" --parallel 1 --cache-ram @PREFIX_MIB@ \
  --threads "${THREADS:-$threads}" "$@"
