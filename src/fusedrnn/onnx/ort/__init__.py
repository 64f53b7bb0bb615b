"""Whole models in ONNX Runtime, with recurrent nodes that run on the fused operator."""
