"""How weights are rounded to few bits."""
