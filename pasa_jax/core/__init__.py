"""What every walker uses: the mathematics of a tile, and which tiles there are."""
