"""HTML pages that need no other file, and the figures in them."""
