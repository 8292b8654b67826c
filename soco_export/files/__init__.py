"""Files and folders: records by hash, atomic writes, and what may be replaced because this program wrote it."""
