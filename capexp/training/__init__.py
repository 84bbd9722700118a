"""The loop that yields epochs, and the checkpoints it can go on from."""
