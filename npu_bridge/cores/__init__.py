"""What each core does: the cube core and its two vector cores."""
