"""Laws of decoding."""

import pytest
import torch

from capexp.captioning.decoding import DecodingConfig, decode
from capexp.captioning.model import MergeDecoder, ModelConfig, build_decoder
from capexp.data.vocabulary import BOS, EOS, PAD, UNK, Unknown, Vocabulary


def vocabulary(unknown: Unknown = "token") -> Vocabulary:
    return Vocabulary(tuple(f"w{i}" for i in range(12)), "standard", unknown)


def decoder_for(words: Vocabulary, seed: int = 0) -> MergeDecoder:
    torch.manual_seed(seed)
    return build_decoder(ModelConfig(embedding_size=8, lstm_units=8), (1, 5), len(words)).eval()


@pytest.mark.parametrize("unknown", ["token", "drop"])
def test_pad_bos_and_unk_are_never_emitted_however_probable(unknown: Unknown) -> None:
    words = vocabulary(unknown)
    decoder = decoder_for(words)
    with torch.no_grad():
        for entry in words.never_emitted:
            decoder.vocabulary.bias[entry] = 100
    hypotheses = decode(decoder, torch.rand(20, 1, 5), words, DecodingConfig(maximum_length=8))
    assert all(not {PAD, BOS} & set(h.tokens) for h in hypotheses)
    assert unknown == "drop" or all(UNK not in h.tokens for h in hypotheses)


@pytest.mark.parametrize("length", [1, 5])
def test_every_caption_ends(length: int) -> None:
    words = vocabulary()
    decoder = decoder_for(words)
    with torch.no_grad():
        decoder.vocabulary.bias[EOS] = -100
    hypotheses = decode(decoder, torch.rand(3, 1, 5), words, DecodingConfig(maximum_length=length))
    assert [len(h.tokens) for h in hypotheses] == [length] * 3


def test_a_batch_gives_each_photo_the_caption_it_gets_alone() -> None:
    words = vocabulary()
    decoder = decoder_for(words, seed=3)
    features = 5 * torch.randn(16, 1, 5, generator=torch.Generator().manual_seed(4))
    together = decode(decoder, features, words, DecodingConfig())
    alone = [decode(decoder, row.unsqueeze(0), words, DecodingConfig())[0] for row in features]
    assert [h.tokens for h in together] == [h.tokens for h in alone]
    assert len({h.tokens for h in together}) > 1
    assert [h.log_probability for h in together] == pytest.approx([h.log_probability for h in alone], abs=1e-4)


def test_the_log_probability_is_that_of_teacher_forcing() -> None:
    words = vocabulary("drop")
    decoder = decoder_for(words, seed=5)
    with torch.no_grad():
        decoder.vocabulary.bias[[PAD, BOS]] = -torch.inf
    features = torch.randn(6, 1, 5)
    for row, hypothesis in zip(
        features, decode(decoder, features, words, DecodingConfig(maximum_length=6)), strict=True
    ):
        tokens = [*hypothesis.tokens, EOS] if len(hypothesis.tokens) < 6 else list(hypothesis.tokens)
        inputs = torch.tensor([[BOS, *tokens[:-1]]])
        chosen = decoder(row.unsqueeze(0), inputs)[0].log_softmax(1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert chosen.sum().item() == pytest.approx(hypothesis.log_probability, abs=1e-4)
