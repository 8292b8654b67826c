"""From a description to nodes: one emitter for each part of a decoder."""
