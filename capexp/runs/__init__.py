"""One run, or many under one: opened, trained, concluded, registered."""
