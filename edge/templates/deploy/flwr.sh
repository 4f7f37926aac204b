#!/bin/sh
# flwr, told where this deployment's server is: ./flwr.sh supernode list tacit
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
export PATH="${VENV:-/opt/tacit}/bin:$PATH" FLWR_HOME="$here/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
mkdir -p "$FLWR_HOME"
printf '[superlink]\ndefault = "tacit"\n\n[superlink.tacit]\naddress = "%s"\nroot-certificates = "%s"\n' \
    "@HOST@:@PORT@" "$here/certificates/ca.crt" > "$FLWR_HOME/config.toml"
exec flwr "$@"
