"""Every way to serve an exported folder, started and compared with PyTorch: python -m benchmarks.servers --help."""
