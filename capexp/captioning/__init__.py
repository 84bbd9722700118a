"""The captioner: its decoders, their decoding, its bundle on disk, and its evaluation on a split."""
