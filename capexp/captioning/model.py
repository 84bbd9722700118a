"""Builds the decoder that ``model.decoder`` names."""

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
    """Return a decoder with newly initialised weights.

    ``features`` is the shape ``(P, F)`` of a photo's features: P grid positions, F values at each.
    """
    return _DECODERS[config.decoder](config, features, vocabulary_size)


def outline_decoder(models: Sequence[ModelConfig], features: tuple[int, int], vocabulary_size: int) -> Decoder:
    """Return a decoder whose weights are on the meta device; several models make an ensemble.

    It allocates no memory. Use it to count parameters, or to fill it with the weights of a file.
    """
    with torch.device("meta"), _SkipInit():
        decoders = [build_decoder(model, features, vocabulary_size) for model in models]
    return decoders[0] if len(decoders) == 1 else Ensemble(decoders)


class _SkipInit(TorchFunctionMode):
    """Skips weight initialisation: on the meta device it sets nothing, yet torch would import its compiler for it."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_initializer = getattr(func, "__module__", None) == "torch.nn.init"
        if is_initializer or func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
