"""The stages of a run: training, artefacts, evidence, report."""
