"""Which libraries are compared, what each is installed from, and the building of their virtual environments."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusedrnn import env

_MARK = "requirements.txt"
"""In a finished environment: what it was built from."""

_LAST_LINES = 3
"""Of what a failed command printed, as many are shown."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment: its folder's name and what pip installs into it."""

    name: str
    requirements: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it is or is to be."""
        return env.peers_directory() / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    @property
    def wanted(self) -> str:
        """What the mark of a finished one says: another Python or other requirements make it another environment."""
        return "\n".join((f"# Python {sys.version_info.major}.{sys.version_info.minor}", *self.requirements, ""))

    def is_built(self) -> bool:
        """Whether it is there, of these requirements."""
        mark = self.folder / _MARK
        return self.python.exists() and mark.is_file() and mark.read_text(encoding="utf-8") == self.wanted

    def build(self) -> None:
        """Make it anew.

        Raises:
            RuntimeError: With the last lines of what failed, or if its folder holds something else, which stays.
        """
        if self.folder.exists() and not (self.folder / "pyvenv.cfg").is_file():
            raise RuntimeError(f"{self.folder} is no virtual environment; move it, or set FUSEDRNN_PEERS")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        _run(sys.executable, "-m", "venv", str(self.folder))
        if self.requirements:
            _run(str(self.python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *self.requirements)
        (self.folder / _MARK).write_text(self.wanted, encoding="utf-8")


@dataclass(frozen=True)
class Peer:
    """A library in one way of using it: the environment that it needs, and the worker that runs it."""

    name: str
    environment: Environment
    worker: str
    """Module in ``workers``."""


_MXNET = Environment("mxnet", ("mxnet==1.9.1", "numpy==1.23.5"))

PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("pytorch", Environment("pytorch", ("torch==2.13.0", "numpy>=1.24")), "with_torch"),
        Peer("onnxruntime", Environment("onnxruntime", ("onnxruntime==1.32.0", "onnx==1.23.2")), "with_onnxruntime"),
        Peer("openvino", Environment("openvino", ("openvino==2026.4.1", "onnx==1.23.2")), "with_openvino"),
        Peer("jax", Environment("jax", ("jax==0.10.2", "jaxlib==0.10.2")), "with_jax"),
        Peer("keras", Environment("keras", ("keras==3.15.1", "tensorflow-cpu==2.21.0")), "with_keras"),
        Peer("mxnet-fused", _MXNET, "with_mxnet"),
        Peer("mxnet-cells", _MXNET, "with_mxnet_cells"),
    )
}
"""Those that ``fusedrnn bench --peers`` knows, in the order of their turns. MXNet is retired: these are its last."""


def environments() -> dict[str, Environment]:
    """All environments by name, each once."""
    return {peer.environment.name: peer.environment for peer in PEERS.values()}


def build(chosen: Sequence[Environment], say: Callable[[str], None]) -> list[str]:
    """Build those that are missing or were built from something else; return the names of those that failed."""
    failed = []
    for environment in chosen:
        if environment.is_built():
            say(f"{environment.name}: already built")
            continue
        say(f"{environment.name}: installing {', '.join(environment.requirements)}")
        try:
            environment.build()
        except RuntimeError as error:
            failed.append(environment.name)
            say(f"{environment.name}: failed: {error}")
        else:
            say(f"{environment.name}: built in {environment.folder}")
    return failed


def _run(*command: str) -> None:
    done = subprocess.run(command, env=env.child_environment({}), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError("\n".join(said[-_LAST_LINES:]) or f"exit code {done.returncode}")
