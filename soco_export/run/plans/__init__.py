"""Plans that something is measured for: what layers take in time, and what they lose in each form and type."""
