"""Numbers of few bits: the one implementation of block rounding, for training and for every export."""
