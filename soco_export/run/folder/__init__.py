"""The folder of a run: its files by name, what it lists of them, who may write into it, and what lies there."""
