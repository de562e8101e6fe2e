"""A tiny model with a LoRA and soft tokens, and preference pairs for it."""

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from integrations_tiny import TEXT, tiny
from peft import LoraConfig

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, InBatch
from agsm_loss.integrations.denoisers import TokenDenoiser
from agsm_loss.integrations.hosts.base import adapters_off
from agsm_loss.integrations.hosts.diffusion_dpo import DiffusionDPO
from agsm_loss.integrations.tokens.attach import make_soft_tokens

SCHEDULERS = {
    "unet": lambda: DDPMScheduler(beta_schedule="scaled_linear"),
    "sd3": FlowMatchEulerDiscreteScheduler,
}


class Setup:
    def __init__(self, name, batch=3, lora=True):
        torch.manual_seed(0)
        self.model = tiny(name).model
        self.plain = tiny(name).model
        self.plain.load_state_dict(self.model.state_dict())
        self.model.requires_grad_(False)
        if lora:
            self.model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
            for part, value in self.model.named_parameters():
                if "lora_B" in part:
                    torch.nn.init.normal_(value, std=0.3)
        tokens = make_soft_tokens(self.model, num_tokens=2, std=1.0).double()
        self.denoiser = TokenDenoiser(self.model, tokens=tokens)
        self.scheduler = SCHEDULERS[name]()
        self.captions = ["a", "b", "c"][:batch]
        self.conditioning = {"prompt_embeds": torch.randn(batch, TEXT, 16).double()}
        if name == "sd3":
            self.conditioning["pooled_prompt_embeds"] = torch.randn(batch, 12).double()
        self.winner, self.loser, self.noise = torch.randn(3, batch, 4, 8, 8).double()
        self.timesteps = torch.tensor([37, 410, 905][:batch])

    @property
    def trained(self):
        return [p for p in self.denoiser.parameters() if p.requires_grad]

    def agsm(self, **settings):
        loss, settings = AGSMLoss(neg_scale=0.1), {"candidates": InBatch(2), **settings}
        return AGSMRegularizer(self.denoiser, EMA(self.trained), loss, **settings)

    def step(self, **settings):
        settings = {"reference": lambda: adapters_off(self.model), "beta": 5.0} | settings
        return DiffusionDPO(self.denoiser, self.scheduler, **settings)

    def run(self, step):
        inputs = self.winner, self.loser, self.conditioning, self.timesteps, self.noise
        out = step(*inputs, captions=self.captions)
        grads = torch.autograd.grad(out.loss, self.trained, allow_unused=True)
        zero = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self.trained, grads, strict=True)
        ]
        return out, zero
