"""AdamW as torch has it, without the seconds that importing torch's compiler takes."""

import inspect
from typing import Any

import torch
from torch.optim import Optimizer


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov and Hutter, ICLR 2019); without weight decay it is Adam (Kingma and Ba, ICLR 2015).

    torch decorates the methods of its optimizers for ``torch.compile``. The decorators import ``torch._dynamo``, which
    takes as long as importing torch itself, although nothing is compiled here. This class has the same methods without
    the decorators. Its states are those of torch's class.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def load_other(self, state: dict[str, Any]) -> None:
        """Load the state of an optimizer of another kind of steps; raise ValueError if its parameters do not fit.

        The learning rate and ``capturable`` of this optimizer are kept.
        """
        kept = [(group["lr"], group["capturable"]) for group in self.param_groups]
        self.load_state_dict(state)
        for group, (rate, capturable) in zip(self.param_groups, kept, strict=True):
            group["lr"], group["capturable"] = rate, capturable
