"""Keys and values of many sequences in pages, for serving."""
