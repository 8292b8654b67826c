"""What a decoder is made of, as data, read from its config.json."""
