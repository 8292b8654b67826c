"""From an HF folder on disk to an ONNX folder that plain ONNX Runtime, onnxruntime-genai and optimum load.

Rooms: `describe/` and `families/` say what a decoder is made of, `read` has its tensors, `emit/` makes the nodes of
each part, `write/` puts nodes and weights on disk, `build` does these in turn; `trace` serves architectures without
a description, `inspect` counts what came out. `soco_export.export` calls them; `soco_export.runtimes` adds what each
runtime wants beside the model.
"""
