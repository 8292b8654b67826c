"""Scores and a parameter budget → one rank per layer."""
