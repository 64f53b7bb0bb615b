"""Runs a module in an environment of its own, and reads the figures that it prints."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import Environment, child_environment

_ROOT = Path(__file__).resolve().parents[2]


def printed_figures(
    environment: Environment, module: str, options: Mapping[str, Any], variables: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """The figures that ``python -m module OPTIONS`` prints as lines of JSON; the environment is built if necessary.

    Args:
        environment: Where the process runs; this project is importable there.
        module: The module.
        options: Its only argument, as JSON.
        variables: Environment variables of the process, in addition to those of this process.

    Raises:
        RuntimeError: If the process fails, or if the environment cannot be built.
    """
    if not environment.is_built():
        print(f"{environment.name}: installing {', '.join(environment.packages)}", flush=True)
        environment.build()
    path = f"{environment.python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    paths = {"PATH": path, "PYTHONPATH": f"{_ROOT / 'src'}{os.pathsep}{_ROOT}"}
    command = [str(environment.python), "-m", module, json.dumps(options)]
    all_variables = child_environment({**paths, **(variables or {})})
    with subprocess.Popen(command, env=all_variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"the process in {environment.name} ended with code {process.returncode}")
