"""Transfer and compute rates that are given, not measured, for tests of plans."""

import torch

from zo2ext.planning.rates import Rates

RATES = Rates(
    device=torch.device("cuda"),
    copy=1e9,
    upload=1e6,
    offload=5e5,
    multiply=dict.fromkeys([torch.float32, torch.bfloat16, torch.float16], 1e9),
)
