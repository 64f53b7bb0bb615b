"""What errors say where an optional package is missing."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fusedrnn.extras import EXTRAS, needs

ROOT = Path(__file__).parents[1]


def test_every_extra_is_one_of_the_package():
    names = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    assert all(f"\n{extra} = [" in names for extra in EXTRAS.values())


def test_packages_of_no_extra():
    assert needs("this", "lightning") == "this needs lightning: install it"


@pytest.mark.parametrize(
    ("statement", "package", "user", "title"),
    [
        ("import fusedrnn.torch", "torch", "fusedrnn.torch", "PyTorch"),
        ("import fusedrnn.jax", "jax", "fusedrnn.jax", "JAX"),
        ("import fusedrnn.keras", "keras", "fusedrnn.keras", "Keras"),
        ("import fusedrnn.onnx", "onnx", "fusedrnn.onnx", "onnx"),
        ("from fusedrnn.jax import accelerate", "flax", "fusedrnn.jax.accelerate", "flax"),
        ("import fusedrnn.jax.nnx", "flax", "fusedrnn.jax.nnx", "flax"),
        ("import fusedrnn.jax.eqx", "equinox", "fusedrnn.jax.eqx", "equinox"),
    ],
)
def test_the_error_names_the_extra(statement, package, user, title):
    program = f"""
        import sys
        class Missing:
            def find_spec(self, name, *arguments):
                if name.partition(".")[0] == {package!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Missing())
        try:
            {statement}
        except ImportError as error:
            print(error)
    """
    if package in ("flax", "equinox"):
        pytest.importorskip("jax")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{user} needs {title}: install fusedrnn with its extra {package!r}\n", done.stderr
