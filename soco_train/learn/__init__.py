"""What every training here shares: the divergence, optimisers, the teacher, recomputed activations."""
