"""Tests on every backend of Keras that is installed: Keras chooses one when it is imported, for the whole process.

A test with a parameter ``backend`` runs in this process on the backend of this process. For another backend one
subprocess runs all tests of the folder, and each test here has the result that it had there.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

_VARIABLE = "KERAS_BACKEND"
CURRENT = os.environ.setdefault(_VARIABLE, "torch")
IN_SUBPROCESS = "KERAS_TESTS_ONE_BACKEND" in os.environ
BACKENDS = (CURRENT,) if IN_SUBPROCESS else tuple(
    name for name in ("torch", "jax", "tensorflow") if importlib.util.find_spec(name)
)  # fmt: skip
_SECONDS = 240


class OtherBackend:
    """The tests of a folder on another backend, run when the first result is asked for.

    Processes that share the tests share the run: the first one that asks starts it, and the others wait.

    Args:
        name: The backend.
        folder: The tests.
        shared: A folder that the processes share.
    """

    def __init__(self, name: str, folder: Path, shared: Path) -> None:
        self.name, self._folder, self._shared = name, folder, shared
        self._results: dict[str, str] | None = None

    def failure_of(self, test: str) -> str:
        """Why a test failed; empty if it passed. ``test`` is its name with parameters."""
        if self._results is None:
            self._results = self._run()
        return self._results.get(test, f"{test} did not run on {self.name}")

    def _run(self) -> dict[str, str]:
        report = self._shared / f"keras-{self.name}.xml"
        try:
            (self._shared / f"keras-{self.name}.started").mkdir()
        except FileExistsError:
            deadline = time.monotonic() + _SECONDS
            while not report.exists() and time.monotonic() < deadline:
                time.sleep(0.2)
        else:
            self._start(report)
        results = {}
        for case in ElementTree.parse(report).iter("testcase"):
            failures = [child.text or "" for child in case if child.tag in ("failure", "error")]
            results[str(case.get("name"))] = "\n".join(failures)
        return results

    def _start(self, report: Path) -> None:
        written = report.with_suffix(".part")
        variables = {**os.environ, _VARIABLE: self.name, "KERAS_TESTS_ONE_BACKEND": "1", "JAX_PLATFORMS": "cpu"}
        variables["FUSEDRNN_TEST_CACHE_DIR"] = os.environ["FUSEDRNN_CACHE_DIR"]  # the session's
        variables = {name: value for name, value in variables.items() if not name.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, f"--junitxml={written}", str(self._folder)],
            env=variables, capture_output=True, text=True, check=False, timeout=_SECONDS,
        )  # fmt: skip
        if not written.exists():
            pytest.fail(f"no results from {self.name}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}", pytrace=False)
        written.replace(report)


def is_worker() -> bool:
    """Whether this process shares the tests with others."""
    return "PYTEST_XDIST_WORKER" in os.environ
