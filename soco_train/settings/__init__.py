"""Everything trainable that a recipe may set, one file for each part of a recipe."""
