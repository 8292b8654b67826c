"""From an HF folder on disk to an ONNX folder that plain ONNX Runtime, onnxruntime-genai and optimum load.

Rooms: `architecture` and `families` say what a decoder is made of, `weights` reads it, `builder` puts the graph
together from `linear` (forms of a layer) and `attention` (flavours), `graph` writes nodes and weights, `layouts` adds
what each runtime wants beside the model, `fallback` serves architectures without a description, `inspect` counts what
came out, `export` is the door.
"""
