"""Captions, vocabulary, features and batches: what a decoder learns from."""
