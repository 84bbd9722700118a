"""The decoders by the names that ``model.decoder`` gives them."""

from typing import overload

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
