"""Weights as sums of singular components, in a basis that knows what the layer reads."""
