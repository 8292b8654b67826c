"""Recipes: what they may say, how files are laid over one another, how they are found."""
