"""Keeps the chatter of exporters off our stdout and stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

_MAX_CHARACTERS = 4000


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Send what is printed meanwhile, by Python or by C++, to a file, and show its end only if the work fails.

    The exporters print progress bars, banners and C++ logs to file descriptors 1 and 2; a command whose stdout is a
    result cannot have that. Warnings and logs are silenced too: they speak of the exporters' own code. All of these
    belong to the process, so other threads are silenced as well.

    Raises:
        Exception: Whatever the work raises, with the end of the captured text as a note.

    Example:
        >>> with silenced():
        ...     print("a progress bar")
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
    threshold = logging.root.manager.disable
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as captured:
        try:
            for descriptor, _ in saved:
                os.dup2(captured.fileno(), descriptor)
            logging.disable(logging.ERROR)  # a handler may hold on to an older stderr than ours
            with (
                contextlib.redirect_stdout(captured),
                contextlib.redirect_stderr(captured),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            captured.flush()
            captured.seek(0)
            error.add_note(captured.read()[-_MAX_CHARACTERS:])
            raise
        finally:
            logging.disable(threshold)
            for descriptor, copy in saved:
                os.dup2(copy, descriptor)
                os.close(copy)
