#!/bin/sh
# One owner's node: a Flower SuperNode that trusts this CA alone and runs the tacit that is installed here, never code that
# it is sent: bin/flwr-clientapp stands before Flower's own in PATH.
set -eu
cd "$(dirname "$0")"
export TACIT_HOME="${TACIT_HOME:-$PWD}" # owner.toml, ledgers, outbox and local state
export PATH="$PWD/bin:${VENV:-/opt/tacit}/bin:$PATH"
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.1
umask 077
exec flower-supernode --superlink @HOST@:@PORT@ --root-certificates ca.crt --auth-supernode-private-key node.key \
    --port "${RUNTIME_PORT:-@RUNTIME_PORT@}" \
    --node-config "owner=\"@OWNER@\" partition-id=@INDEX@ num-partitions=@OWNERS@ recipe=\"$PWD/recipe.toml\""
