"""What a decoder is made of, as data: parts, the config they are read from, and the tensors they need."""
