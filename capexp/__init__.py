"""capexp: an image captioner that is also a proper experiment.

Captions and photos become cached VGG16 features and teacher-forced batches; a decoder learns from them in a
loop that yields epochs; MLflow records them and keeps the best-dev model; Optuna searches; the champion
captions photos.
"""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from capexp.captioning.captioner import Captioner

__version__ = "0.1.0"


def load(model: str | PathLike[str], *, device: str = "auto", weights: str | None = None) -> "Captioner":
    """Return a captioner, which is called with photos: ``capexp.load(model)("holiday.jpg").text``.

    ``model`` is a bundle's folder, ``runs:/ID/captioner``, ``models:/NAME/VERSION`` or ``models:/NAME@champion``.
    MLflow looks for it in MLFLOW_TRACKING_URI, by default in ``mlflow.db`` in the working directory. ``device`` is
    ``cpu``, ``cuda``, or ``auto``: a GPU if there is one. ``weights`` is a file of VGG16's weights. By default they are
    taken from the model, or downloaded at the first photo.
    """
    from capexp.captioning.captioner import Captioner
    from capexp.distributed import choose_device
    from capexp.tracking.models import find_bundle

    captioner = Captioner.load(find_bundle(str(model)), choose_device(device))
    if weights is not None:
        captioner.use_encoder(weights)
    return captioner
