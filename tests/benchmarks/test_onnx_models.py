"""The benchmark of whole ONNX models: which it measures, and what it writes down."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks.onnx_models import app
from fusedrnn.onnx.ort import shared_object
from onnx_networks import gru_stack, helper, lstm_variants, model_of, value

pytestmark = pytest.mark.skipif(not shared_object.is_supported(), reason="no custom operators on this system")


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_models_of_a_folder(tmp_path):
    """Models of one structure have one row, those without recurrent nodes none."""
    plain = model_of([helper.make_node("Relu", ["X"], ["Y"])], [value("X", shape=[3])], [value("Y")])
    stack, _ = gru_stack()
    for name, model in (("a", stack), ("b", stack), ("c", plain), ("d", lstm_variants()[0])):
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    rows_file = tmp_path / "rows.json"
    result = run(tmp_path, "--seconds", 0.02, "--steps", 9, "--json", rows_file)
    assert result.exit_code == 0, result.output
    rows = json.loads(rows_file.read_text(encoding="utf-8"))["rows"]
    assert [row["model"] for row in rows] == [f"{tmp_path.name}/a.onnx and 1 more", f"{tmp_path.name}/d.onnx"]
    assert [row["nodes"] for row in rows] == [2, 3]
    assert all(row["onnxruntime"] > 0 and row["fused"] > 0 and 0 <= row["error"] <= 1 for row in rows)


def test_there_must_be_models(tmp_path):
    for arguments, message in (([tmp_path], "there must be a model"), (["--package", "no-package"], "no-package")):
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.output
