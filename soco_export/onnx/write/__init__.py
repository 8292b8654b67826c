"""The graph and its weights on disk: nodes, matrices in pieces, rounded blocks."""
