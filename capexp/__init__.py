"""capexp: an image captioner that is also a proper experiment.

Captions and photos become cached VGG16 features and teacher-forced batches; a decoder learns from them in a
loop that yields epochs; MLflow records them and keeps the best-dev model; Optuna searches; the champion
captions photos.
"""

__version__ = "0.1.0"
