"""Teacher forcing over padded captions, as tests write them down: the packed pass, its logits put back in place."""

from torch import Tensor

from capexp.captioning.decoder import Decoder, Packed


def logits_of(decoder: Decoder, features: Tensor, inputs: Tensor, photos: Tensor | None = None) -> Tensor:
    """Logits ``(B, T, V)`` after each of the inputs ``(B, T)``, zero at PAD; ``photos`` as in ``Decoder.logits``."""
    packed = Packed.of(inputs)
    rows = packed.order if photos is None else photos[packed.order]
    logits = decoder.logits(features, rows, packed.words, packed.counts)
    return logits.new_zeros(*inputs.shape, logits.shape[1]).index_put((packed.rows, packed.steps), logits)
