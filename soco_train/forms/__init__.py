"""How a low-rank layer is stored: its numbers, and the module that computes with them."""
