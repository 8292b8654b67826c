"""One file per picture of the report: results and material in, a matplotlib figure filled, a sentence out."""
