"""Graph passes over canonical ops: one a file, each an ``onnx_ir`` pass with its conditions stated."""
