#!/bin/sh
# Lets the nodes connect whose public keys lie in nodes/. Once is enough; one that is registered already is left alone.
set -u
here="$(cd "$(dirname "$0")" && pwd)"
failed=0
for key in "$here"/nodes/*.pub; do
    name="$(basename "$key" .pub)"
    if answer="$("$here/flwr.sh" supernode register "$key" tacit --name "$name" 2>&1)"; then
        echo "$name: registered"
    elif echo "$answer" | grep -qi "already"; then
        echo "$name: registered before"
    else
        echo "$name: $answer" >&2
        failed=5
    fi
done
exit $failed
