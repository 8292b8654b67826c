"""Everything that can be known before a run starts: what is wrong, and what it costs."""
