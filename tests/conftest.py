"""What every test runs under: no telemetry of other people's packages, no deadlines, and a Ctrl-C that arrives."""

import os
import signal

from hypothesis import settings

# How long an example takes says how busy the machine is.
settings.register_profile("tacit", deadline=None)
settings.load_profile("tacit")

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Started in the background of a script, a process ignores SIGINT, and so would the children that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
