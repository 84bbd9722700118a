"""The decoders by the names that ``model.decoder`` gives them."""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch.overrides import TorchFunctionMode

from capexp.captioning.attention import AttentionDecoder
from capexp.captioning.decoder import Decoder, ModelConfig, RecurrentDecoder
from capexp.captioning.ensemble import Ensemble
from capexp.captioning.merge import MergeDecoder

_DECODERS: dict[str, type[MergeDecoder] | type[AttentionDecoder]] = {
    "merge": MergeDecoder,
    "attention": AttentionDecoder,
}


@overload
def build_decoder(config: ModelConfig, features: tuple[int, int], vocabulary_size: int) -> RecurrentDecoder: ...


@overload
def build_decoder(
    config: ModelConfig | tuple[ModelConfig, ...], features: tuple[int, int], vocabulary_size: int
) -> Decoder: ...


def build_decoder(
    config: ModelConfig | tuple[ModelConfig, ...], features: tuple[int, int], vocabulary_size: int
) -> Decoder:
    """A decoder with fresh weights, for features ``(P, F)`` of a photo and V words; of several configs, an ensemble.

    Raises:
        InputError: features that the decoder cannot take.
    """
    if isinstance(config, tuple):
        return Ensemble([build_decoder(one, features, vocabulary_size) for one in config])
    return _DECODERS[config.decoder](config, features, vocabulary_size)


def outline_decoder(
    config: ModelConfig | tuple[ModelConfig, ...], features: tuple[int, int], vocabulary_size: int
) -> Decoder:
    """The same decoder without weights, or memory for them: to be counted, or to take those of a file.

    Raises:
        InputError: features that the decoder cannot take.
    """
    with torch.device("meta"), _Undrawn():
        return build_decoder(config, features, vocabulary_size)


class _Undrawn(TorchFunctionMode):
    """Draws no initial values: without memory there are none, and to tell their shapes torch imports its compiler."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_initializer = getattr(func, "__module__", None) == "torch.nn.init"
        if is_initializer or func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
