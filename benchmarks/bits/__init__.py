"""What rounding costs: dense and low-rank models in blocks of few bits, by rule, size and perplexity."""
