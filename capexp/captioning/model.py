"""The decoders by the names that ``model.decoder`` gives them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from capexp.captioning.attention import AttentionDecoder
from capexp.captioning.decoder import Decoder, RecurrentDecoder
from capexp.captioning.ensemble import Ensemble
from capexp.captioning.merge import MergeDecoder
from capexp.settings import ModelConfig

_DECODERS: dict[str, type[MergeDecoder] | type[AttentionDecoder]] = {
    "merge": MergeDecoder,
    "attention": AttentionDecoder,
}


def build_decoder(config: ModelConfig, features: tuple[int, int], vocabulary_size: int) -> RecurrentDecoder:
    """Return a decoder with fresh weights, for features ``(P, F)`` of a photo and V words."""
    return _DECODERS[config.decoder](config, features, vocabulary_size)


def outline_decoder(models: Sequence[ModelConfig], features: tuple[int, int], vocabulary_size: int) -> Decoder:
    """Return a decoder, of several models an ensemble, without memory for its weights.

    It is there to be counted, or to take the weights of a file.
    """
    with torch.device("meta"), _SkipInit():
        decoders = [build_decoder(model, features, vocabulary_size) for model in models]
    return decoders[0] if len(decoders) == 1 else Ensemble(decoders)


class _SkipInit(TorchFunctionMode):
    """Skips initialisation: without memory there are no values, and torch would import its compiler for the shapes."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_initializer = getattr(func, "__module__", None) == "torch.nn.init"
        if is_initializer or func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
