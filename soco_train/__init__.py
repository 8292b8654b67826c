"""Learns which singular components of a model's linear layers matter, and turns a parameter budget into factors.

Text becomes token blocks, blocks become statistics, weights become spectra, training gives each component a score, a
plan gives each layer a rank, and what leaves is the factors. Nothing here knows of ONNX or of the command line.
"""
