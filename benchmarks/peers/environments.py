"""The libraries to compare with, their packages, and how their environments are built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

_MARKER = "requirements.txt"
"""The file in each finished environment that records from what it was built."""

_ERROR_LINES = 3
"""How many lines of the output of a failed command are shown."""

_PYTHON_PATHS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def peers_directory() -> Path:
    """The folder of the environments: ``FUSEDRNN_PEERS``, by default ``.peers`` in the checkout.

    Raises:
        ValueError: If the variable starts with ``~user`` and that user has no home folder.
    """
    value = os.environ.get("FUSEDRNN_PEERS", "").strip()
    if not value:
        return _ROOT / ".peers"
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError:
        message = f"FUSEDRNN_PEERS must be a folder's path; got {value!r}, and that user has no home folder"
        raise ValueError(message) from None


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for a process with another Python, without those that point to this Python's packages."""
    inherited = {name: value for name, value in os.environ.items() if name not in _PYTHON_PATHS}
    return {**inherited, **changes}


@dataclass(frozen=True)
class Environment:
    """A virtual environment: the name of its folder, and what pip installs into it.

    Attributes:
        name: The name.
        requirements: The packages.
        alone: Packages installed without their dependencies, which may be large and are not used.
    """

    name: str
    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()

    @property
    def packages(self) -> tuple[str, ...]:
        """All packages that pip installs by name."""
        return *self.requirements, *self.alone

    @property
    def folder(self) -> Path:
        """Its path, whether it is built or not."""
        return peers_directory() / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    @property
    def marker_text(self) -> str:
        """The content of its marker. With another Python or other requirements, it must be built again."""
        python = f"# Python {sys.version_info.major}.{sys.version_info.minor}"
        return "\n".join((python, *self.packages, ""))

    def is_built(self) -> bool:
        """Whether it is built from these requirements."""
        marker = self.folder / _MARKER
        return self.python.exists() and marker.is_file() and marker.read_text(encoding="utf-8") == self.marker_text

    def build(self) -> None:
        """Build it from scratch.

        Raises:
            RuntimeError: If a command fails, when the message has the last lines of its output; or if the folder holds
                something else, which is not changed.
        """
        if self.folder.exists() and not (self.folder / "pyvenv.cfg").is_file():
            raise RuntimeError(f"{self.folder} is not a virtual environment; move it, or set FUSEDRNN_PEERS")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        _run(sys.executable, "-m", "venv", str(self.folder))
        for options, packages in (((), self.requirements), (("--no-deps",), self.alone)):
            if packages:
                pip = str(self.python), "-m", "pip", "install", "-q", "--disable-pip-version-check"
                _run(*pip, *options, *packages)
        (self.folder / _MARKER).write_text(self.marker_text, encoding="utf-8")


@dataclass(frozen=True)
class Peer:
    """A library, used in one way: its environment, and the worker that runs it."""

    name: str
    environment: Environment
    worker: str
    """The module in ``workers``."""
    formats: tuple[str, ...] = ("float32",)
    """The formats of GEMM operands in which it is compared; ``float32`` stands for the dtype."""
    lacking: str = "is compared in float32 alone"
    """Why it is not compared in other formats."""


ALL_FORMATS = ("float32", "bfloat16", "int8")
_MXNET = Environment("mxnet", ("mxnet==1.9.1", "numpy==1.23.5"))

PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("pytorch", Environment("pytorch", ("torch==2.13.0", "numpy>=1.24")), "with_torch", ALL_FORMATS),
        Peer(
            "onnxruntime", Environment("onnxruntime", ("onnxruntime==1.32.0", "onnx==1.23.2")), "with_onnxruntime",
            ("float32", "int8"), "has no recurrent operators in bfloat16",
        ),
        Peer(
            "openvino", Environment("openvino", ("openvino==2026.4.1", "onnx==1.23.2")), "with_openvino",
            ("float32", "bfloat16"), "quantizes no recurrent layers to int8 at run time",
        ),
        Peer("jax", Environment("jax", ("jax==0.10.2", "jaxlib==0.10.2")), "with_jax"),
        Peer("keras", Environment("keras", ("keras==3.15.1", "tensorflow-cpu==2.21.0")), "with_keras"),
        Peer("mxnet-fused", _MXNET, "with_mxnet"),
        Peer("mxnet-cells", _MXNET, "with_mxnet_cells"),
    )
}  # fmt: skip
"""Every peer, in the order of turns. MXNet is retired, and 1.9.1 is its last version."""


def in_formats(peers: Sequence[str], formats: Sequence[str]) -> tuple[str, ...]:
    """The name of each peer in each format, as a contender: ``pytorch``, ``pytorch bfloat16`` and so on."""
    return tuple(
        name if number_format == "float32" else f"{name} {number_format}" for number_format in formats for name in peers
    )


def format_of(contender: str) -> str:
    """The format of operands of a contender named by :func:`in_formats`."""
    return contender.partition(" ")[2] or "float32"


def peer_of(contender: str) -> str:
    """The name of the peer of a contender named by :func:`in_formats`."""
    return contender.partition(" ")[0]


def environments() -> dict[str, Environment]:
    """All environments by name, without duplicates."""
    return {peer.environment.name: peer.environment for peer in PEERS.values()}


def build(chosen: Sequence[Environment], say: Callable[[str], None]) -> list[str]:
    """Build the environments that are missing or out of date. Returns the names of those that failed."""
    failed = []
    for environment in chosen:
        if environment.is_built():
            say(f"{environment.name}: already built")
            continue
        say(f"{environment.name}: installing {', '.join(environment.packages)}")
        try:
            environment.build()
        except RuntimeError as error:
            failed.append(environment.name)
            say(f"{environment.name}: failed: {error}")
        else:
            say(f"{environment.name}: built in {environment.folder}")
    return failed


def _run(*command: str) -> None:
    done = subprocess.run(command, env=child_environment({}), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError("\n".join(lines[-_ERROR_LINES:]) or f"exit code {done.returncode}")
