#!/bin/sh
# The server: a Flower SuperLink with TLS, to which only registered nodes may connect. Needs tacit[federated] in $VENV.
set -eu
cd "$(dirname "$0")"
export PATH="${VENV:-/opt/tacit}/bin:$PATH"
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.1
export TACIT_HOME="${TACIT_HOME:-$PWD/home}"
umask 077
exec flower-superlink --host "${BIND:-0.0.0.0}" --port @PORT@ --database state.db \
    --ssl-ca-certfile certificates/ca.crt --ssl-certfile certificates/server.pem --ssl-keyfile certificates/server.key \
    --enable-supernode-auth --disable-runtime-dependency-installation
