"""From the user's arguments to an implementation, and back: the public functions."""
