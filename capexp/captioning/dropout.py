"""Dropout whose masks are cheap to draw on a CPU."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """``nn.Dropout`` with one random byte per value on a CPU, where torch draws a 64-bit number for each.

    On a CPU the dropped share is therefore ``p`` rounded to a multiple of 1/256. Kept values are divided by the share
    that is really kept, as torch does.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Return the values as they are in evaluation mode; while training, set each to zero with probability ``p``."""
        dropped = round(self.p * 256)
        if not self.training or values.device.type != "cpu" or dropped in (0, 256):
            return super().forward(values)
        words = torch.empty(-(-values.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: values.numel()].view(values.shape) >= dropped
        return values * kept.to(values.dtype).mul_(256 / (256 - dropped))
