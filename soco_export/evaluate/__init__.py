"""How close a model is to the one before it: parity, perplexity, tasks."""
