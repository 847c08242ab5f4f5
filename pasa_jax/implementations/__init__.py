"""The implementations that need no other package: the lax walk, and the plain formula."""
