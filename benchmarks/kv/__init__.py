"""A smaller value cache: projections of the values, absorbed by v_proj and o_proj, beside the SVD of v_proj."""
