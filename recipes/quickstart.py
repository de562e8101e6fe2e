"""AGSM in a whole training run without diffusers: four captions, four places. It has no options."""

import torch
from torch import nn

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, SoftTokens


class Denoiser(nn.Module):  # stands for yours: (x_t, t, text, bank) -> prediction
    def __init__(self):
        super().__init__()
        self.tokens = SoftTokens(16, num_tokens=2)
        self.net = nn.Sequential(nn.Linear(19, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, noisy, timesteps, text, bank):
        text = text + self.tokens(timesteps, bank).mean(1)
        return self.net(torch.cat([noisy, timesteps.unsqueeze(1) / 1000, text], dim=1))


torch.manual_seed(0)
places, text = torch.tensor([[-2.0, 0], [2, 0], [0, 2], [0, -2]]), torch.randn(4, 16)
model = Denoiser()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
ema = EMA(model.parameters(), decay=0.99)
agsm = AGSMRegularizer(model, ema, AGSMLoss(neg_scale=0.1))  # its negatives train the tokens alone

for step in range(501):
    caption, t, eps = torch.randint(4, (64,)), torch.randint(1000, (64,)), torch.randn(64, 2)
    angle = (t / 1000 * torch.pi / 2).unsqueeze(1)
    noisy = angle.cos() * places[caption] + angle.sin() * eps
    pred = model(noisy, t, text[caption], torch.zeros(64, dtype=torch.long))
    host_loss = nn.functional.mse_loss(pred, eps)
    term = agsm(noisy, t, eps, text[caption], caption, pred=pred)  # the one line
    loss = host_loss + 0.5 * term.loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agsm.update_ema()
    if step % 100 == 0:
        won = term.metrics["agsm/win_rate"].item()
        print(f"step {step:3}  loss {loss.item():.3f}  matching caption ranked first {won:.2f}")
