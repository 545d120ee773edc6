#!/bin/sh
# Whether the server answers: healthcheck.sh [--wait SECONDS] [--ask]
#
# --wait asks again until it answers or the time is over; --ask has it write one token too.
# HOST, PORT and EDGEQ_SERVE_API_KEY are those of run.sh. The exit status is 0 if it answers.
set -eu
here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
prefix=${PREFIX:-$(dirname "$here")}
exec "$prefix/venv/bin/python" - "$@" << 'END'
import json
import os
import sys
import time
import urllib.request

host = os.environ.get("HOST") or "127.0.0.1"
host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
host = f"[{host}]" if ":" in host else host
url = f"http://{host}:{os.environ.get('PORT') or '8080'}"
key = os.environ.get("EDGEQ_SERVE_API_KEY", "none")
arguments = sys.argv[1:]
wait = float(arguments[arguments.index("--wait") + 1]) if "--wait" in arguments else 0.0


def get(path, body=None):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=60) as r:
        return json.load(r)


end = time.monotonic() + wait
while True:
    try:
        get("/health")
        break
    except OSError as err:
        if time.monotonic() >= end:
            sys.exit(f"healthcheck.sh: {url} does not answer: {err}")
        time.sleep(0.5)
if "--ask" in arguments:
    asked = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
    answer = get("/v1/completions", asked)
    if answer["usage"]["completion_tokens"] < 1:
        sys.exit("healthcheck.sh: the model wrote nothing")
print(f"{url} answers")
END
