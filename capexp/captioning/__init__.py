"""The decoders, how they are decoded, and the captioner that holds all that a caption needs."""
