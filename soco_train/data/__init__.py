"""Calibration and evaluation text → blocks of tokens → batches."""
