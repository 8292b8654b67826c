"""Download sizes of exports: `soco-export pack` beside zstd -19 and ZipNN."""
