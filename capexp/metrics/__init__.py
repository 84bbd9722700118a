"""The metrics of captions against reference captions."""
