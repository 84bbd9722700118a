"""The model that MLflow serves: its input is a table of photos, its output their captions.

MLflow executes this file when it loads the model ("models from code"), so that no object is pickled.
"""

import base64
import binascii
import threading
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from pydantic import ValidationError

from capexp.captioning.captioner import Captioner
from capexp.data.photos import MAXIMUM_UPLOAD
from capexp.errors import InputError
from capexp.settings import DecodingConfig

# Limits of one request; MLflow itself accepts a body of any size.
MAXIMUM_PHOTOS = 64
MAXIMUM_BYTES = 64 * 2**20  # of all photos together
MAXIMUM_BEAM_WIDTH = 100


class ServedCaptioner(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Captions the photos in the column ``photo``: base64 text, or bytes if the caller is Python code."""

    def load_context(self, context: Any) -> None:
        """Load the bundle. Its encoder is loaded, and downloaded if necessary, at the first photo."""
        self.captioner = Captioner.load(Path(context.artifacts["bundle"]))
        # Only one request at a time: each uses all cores, and memory is needed for one request only.
        self.turn = threading.Lock()

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Return one record per photo: ``caption`` and ``log_probability``, or the ``error`` of that photo.

        ``params`` may contain ``method`` and ``beam_width``, which override the bundle's. A wrong param or too
        many photos raise MlflowException, for which a server answers 400.
        """
        values = list(model_input["photo"])
        _refuse_many(values)
        decoding = self._decoding(params or {})
        photos = [_decode(value) for value in values]
        readable = [photo for photo in photos if isinstance(photo, bytes)]
        try:
            with self.turn:
                results = iter(self.captioner.caption_photos(list(readable), decoding))
        except InputError as error:  # the encoder's weights are not available: no photo can be captioned
            return [_record(photo if isinstance(photo, InputError) else error) for photo in photos]
        return [_record(photo if isinstance(photo, InputError) else next(results)) for photo in photos]

    def _decoding(self, params: dict[str, Any]) -> DecodingConfig:
        """Return the bundle's decoding settings, overridden by the request's params."""
        given = {name: value for name, value in params.items() if value is not None}
        try:
            decoding = DecodingConfig.model_validate(self.captioner.decoding.model_dump() | given)
            if decoding.beam_width > MAXIMUM_BEAM_WIDTH:
                raise InputError(f"params.beam_width = {decoding.beam_width}: at most {MAXIMUM_BEAM_WIDTH} here")
            self.captioner.check_decoding(decoding)
        except ValidationError as error:
            first = error.errors()[0]
            message = f"params.{first['loc'][0]} = {first['input']!r}: {first['msg']}"
        except InputError as error:
            message = str(error)
        else:
            return decoding
        raise MlflowException(message, error_code=BAD_REQUEST)


def _refuse_many(values: list[object]) -> None:
    """Reject a request with too many photos, or with too many bytes."""
    size = sum(_size(value) for value in values)
    if len(values) > MAXIMUM_PHOTOS:
        message = f"{len(values)} photos: a request holds at most {MAXIMUM_PHOTOS}; send them in several"
    elif size > MAXIMUM_BYTES:
        message = f"photos of {size:,} bytes: a request holds at most {MAXIMUM_BYTES:,}; send them in several"
    else:
        return
    raise MlflowException(message, error_code=BAD_REQUEST)


def _size(value: object) -> int:
    """Return the size of a photo in bytes; base64 text has four characters per three bytes."""
    return len(value) if isinstance(value, bytes) else len(str(value)) * 3 // 4


def _decode(value: object) -> bytes | InputError:
    """Return the bytes of a photo, or what is wrong with it. Text must be base64: no path or address is opened."""
    if _size(value) > MAXIMUM_UPLOAD:
        return InputError(f"the photo has {_size(value):,} bytes, over {MAXIMUM_UPLOAD:,}; scale it down")
    if isinstance(value, bytes):
        return value
    try:
        if isinstance(value, str):
            return base64.b64decode("".join(value.split()), validate=True)  # base64 tools insert line breaks
    except (binascii.Error, ValueError):
        pass
    return InputError("the photo is not base64; send the file's bytes in base64, not its path or address")


def _record(result: Any) -> dict[str, Any]:
    """Return a photo's caption or error as a row of the output."""
    if isinstance(result, InputError):
        return {"caption": None, "log_probability": None, "error": str(result)}
    return {"caption": result.text, "log_probability": result.log_probability, "error": None}


mlflow.models.set_model(ServedCaptioner())
