"""The optimizer without torch's decorators does what torch's own does, and does not import torch's compiler."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from capexp.training.optimizer import AdamW


@pytest.mark.parametrize(
    ("kind", "weight_decay"), [(torch.optim.AdamW, 0.0), (torch.optim.AdamW, 0.1), (torch.optim.Adam, 0.0)]
)
def test_its_steps_and_states_are_those_of_torchs_own(
    kind: type[torch.optim.AdamW] | type[torch.optim.Adam], weight_decay: float
) -> None:
    torch.manual_seed(0)
    ours = nn.Linear(5, 3)
    theirs = copy.deepcopy(ours)
    own: torch.optim.Optimizer = AdamW(ours.parameters(), lr=0.1, weight_decay=weight_decay, fused=True)
    torchs: torch.optim.Optimizer = kind(theirs.parameters(), lr=0.1, weight_decay=weight_decay, fused=True)
    for step in range(6):
        inputs = torch.randn(4, 5)
        for layer, optimizer in ((ours, own), (theirs, torchs)):
            optimizer.zero_grad()
            torch.autograd.backward(layer(inputs).square().sum())
            optimizer.step()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        if step == 2:  # each goes on with the other's state
            own_state, torchs_state = copy.deepcopy(own.state_dict()), copy.deepcopy(torchs.state_dict())
            assert own_state["param_groups"][0].keys() == torchs_state["param_groups"][0].keys()
            own.load_state_dict(torchs_state)
            torchs.load_state_dict(own_state)


@pytest.mark.slow
def test_an_epoch_does_not_import_torchs_compiler() -> None:
    program = """
import sys, torch
from capexp.training.optimizer import AdamW
layer = torch.nn.Linear(5, 3)
optimizer = AdamW(layer.parameters(), lr=0.1, fused=True)
torch.autograd.backward(layer(torch.ones(1, 5)).sum())
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert printed.stdout == "False\n"
