"""The training loop, its objectives, and the checkpoints from which it can resume."""
