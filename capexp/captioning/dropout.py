"""Dropout whose masks cost little to draw on a CPU."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """Torch's dropout, with a byte of randomness a value on a CPU, where torch draws a number of 64 bits for each.

    So the share that is dropped is a multiple of 1/256 there: the nearest to ``p``. Values that are kept grow by what
    the share is, as in torch.
    """

    def forward(self, values: Tensor) -> Tensor:
        """The values in evaluation mode, otherwise each with probability ``p`` as zero."""
        dropped = round(self.p * 256)
        if not self.training or values.device.type != "cpu" or dropped in (0, 256):
            return super().forward(values)
        words = torch.empty(-(-values.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: values.numel()].view(values.shape) >= dropped
        return values * kept.to(values.dtype).mul_(256 / (256 - dropped))
