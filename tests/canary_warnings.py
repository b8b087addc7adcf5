"""A pytest plugin for the canary: keep every deprecation that a library reports, with the place in our code.

Filters do not matter: a test that ignores a warning is recorded too. Each process writes its own file.
"""

import json
import logging
import os
import sys
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = (str(ROOT / "trl_cdr"), str(ROOT / "examples"), str(ROOT / "tests"))
LOGGERS = ("transformers", "trl", "accelerate", "peft", "datasets")
FOLDER = "TRL_CDR_CANARY"  # environment variable: where the files go


class Recorder(logging.Handler):
    """Counts each deprecation by (package, kind, message, place)."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def install(self):
        """Record what goes through `warnings.warn` and through the libraries' loggers from now on."""
        warn = warnings.warn

        def recording(message, category=None, stacklevel=1, source=None, **kwargs):
            kind = type(message) if isinstance(message, Warning) else category or UserWarning
            if issubclass(kind, (DeprecationWarning, FutureWarning, PendingDeprecationWarning)):
                self.add(kind.__name__, str(message), sys._getframe(1))
            return warn(message, category, stacklevel + 1, source, **kwargs)

        warnings.warn = recording
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self)

    def emit(self, record):
        message = record.getMessage()
        if "deprecat" in message.lower():
            self.add("log", message, sys._getframe(1), package=record.name.partition(".")[0])

    def add(self, kind, message, frame, package=None):
        """Count one deprecation; `frame` is the one that reports it."""
        package = package or str(frame.f_globals.get("__name__", "?")).partition(".")[0]
        lines = message.strip().splitlines() or [""]
        self.counts[package, kind, lines[0], place_of(frame)] += 1

    def write(self, folder):
        """Write the counts as JSON, in a file of this process."""
        rows = [{"count": count, **dict(zip(FIELDS, key, strict=True))} for key, count in self.counts.items()]
        Path(folder, f"warnings-{os.getpid()}.json").write_text(json.dumps(rows), encoding="utf-8")


FIELDS = ("package", "kind", "message", "place")


def place_of(frame):
    """Return file and line of the innermost frame of our code, the package's before a test's; "-" if there is none."""
    places = []
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS) and name != __file__:
            places.append(f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}")
        frame = frame.f_back
    return next((place for place in places if place.startswith("trl_cdr")), places[0] if places else "-")


recorder = Recorder()
if FOLDER in os.environ:  # as a plugin; the canary installs it itself
    recorder.install()


def pytest_sessionfinish():
    if FOLDER in os.environ:
        recorder.write(os.environ[FOLDER])
