"""The run folder and the verbs on it: what the command line calls, and what Python may call instead."""
