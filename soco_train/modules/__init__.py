"""Which layers take part, and what stands in for one while it learns."""
