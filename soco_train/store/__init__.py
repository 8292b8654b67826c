"""What training leaves on disk: spectra, scores, factors. Safetensors with a JSON header; no pickle."""
