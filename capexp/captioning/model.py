"""The decoders by the names that ``model.decoder`` gives them."""

from capexp.captioning.attention import AttentionDecoder
from capexp.captioning.decoder import Decoder, ModelConfig
from capexp.captioning.merge import MergeDecoder

_DECODERS: dict[str, type[MergeDecoder] | type[AttentionDecoder]] = {
    "merge": MergeDecoder,
    "attention": AttentionDecoder,
}


def build_decoder(config: ModelConfig, features: tuple[int, int], vocabulary_size: int) -> Decoder:
    """A decoder with fresh weights, for features ``(P, F)`` of a photo and V words.

    Raises:
        InputError: features that the decoder cannot take.
    """
    return _DECODERS[config.decoder](config, features, vocabulary_size)
