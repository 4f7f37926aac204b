"""What every test runs under: no telemetry of other people's packages."""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
