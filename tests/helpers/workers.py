"""What each rank does in the tests with several processes (importable by the spawned ones)."""

import os
import sys
from types import SimpleNamespace

import torch
from integrations_tiny import tiny
from strategies import errors_of
from torch import nn

from agsm_loss import (
    EMA,
    AdaptiveTemperature,
    AGSMLoss,
    AGSMRegularizer,
    Bank,
    InBatch,
    Passes,
)
from agsm_loss.integrations.denoisers import TokenDenoiser
from agsm_loss.integrations.hosts.ddpo_parts import BestSamples
from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens


def adaptive_temperature(rank):
    """T of ranks with errors of other scales; then where one rank has none that say anything."""
    scale = torch.tensor([1.0, 30.0]).double()
    own = [errors_of(0) * scale[rank], errors_of(0) if rank == 0 else torch.ones(4, 4).double()]
    return [float(AdaptiveTemperature()(errors[: 64 - 40 * rank])) for errors in own]


class Wrapped(nn.Module):
    """What DDP wraps: the frozen denoiser and its tokens, without the names of conditioning."""

    def __init__(self, made, checkpointing):
        super().__init__()
        torch.manual_seed(0)
        self.model = made.model
        self.tokens = make_soft_tokens(made.model, num_tokens=2, std=1.0).double()
        self.attached = attach_soft_tokens(made.model, self.tokens)
        if checkpointing:
            self.model.train().enable_gradient_checkpointing()

    def forward(self, x, bank):
        with self.attached.using(bank):
            return self.model(**x)[0]


def token_gradients(batch, rows=slice(None), wrap=lambda module: module, checkpointing=False):
    """Gradients of the mean over the batch's rows of two calls' outputs."""
    made = tiny("sd3")
    denoiser = Wrapped(made, checkpointing)
    wrapped = wrap(denoiser)
    x = {n: v[rows] if isinstance(v, torch.Tensor) else v for n, v in made.inputs(batch).items()}
    first = wrapped(x, Bank.POSITIVE)
    second = wrapped(x, Bank.NEGATIVE)
    (first.square() + 2 * second.square()).mean().backward()
    denoiser.attached.detach()
    return [p.grad for p in denoiser.tokens.parameters()]


def _ddp(rank, checkpointing):
    return token_gradients(
        4, slice(2 * rank, 2 * rank + 2), nn.parallel.DistributedDataParallel, checkpointing
    )


def ddp_plain(rank):
    return _ddp(rank, checkpointing=False)


def ddp_checkpointed(rank):
    return _ddp(rank, checkpointing=True)


def regularizer(rank):
    """AGSM on SD3 (it has buffers) in DDP as it comes; rank 1 has no negatives."""
    made = tiny("sd3")
    model = made.model.float().requires_grad_(False)
    assert list(model.buffers())
    torch.manual_seed(rank)  # DDP gives all ranks the first one's
    tokens = make_soft_tokens(model, num_tokens=2, banks="positive_only")
    ddp = nn.parallel.DistributedDataParallel(TokenDenoiser(model, tokens=tokens))
    optimizer = torch.optim.SGD([p for p in tokens.parameters() if p.requires_grad], lr=0.1)

    def regularized(seed, **settings):
        loss, rule = AGSMLoss(neg_scale=0.5), InBatch(allow_empty=True)
        ema = EMA(tokens.parameters())
        return AGSMRegularizer(ddp, ema, loss, candidates=rule, seed=seed, **settings)

    generator = torch.Generator().manual_seed(rank)
    noisy, target = torch.randn(2, 2, 4, 8, 8, generator=generator)
    text = {
        "prompt_embeds": torch.randn(2, 6, 16, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, 12, generator=generator),
    }
    batch = noisy, torch.tensor([100.0, 900.0]), target, text
    captions = ["one", "two"] if rank == 0 else ["one", "one"]
    agsm = regularized(seed=rank)
    for _ in range(2):
        pred = ddp(*batch[:2], text, torch.zeros(2, dtype=torch.long))
        optimizer.zero_grad()
        agsm(*batch, captions, pred=pred).loss.backward()
        optimizer.step()
    try:
        eager = regularized(rank, passes=Passes(backward=torch.Tensor.backward))
        eager(*batch, captions, pred=pred)
        refused = ""
    except ValueError as error:
        refused = str(error)
    first = regularized(seed=0)
    first.calls = 1
    resumed = regularized(seed=rank)
    resumed.load_state_dict(first.state_dict())
    return {
        "weights": [p.detach() for p in tokens.parameters()],
        "refused": refused,
        "steps": agsm.calls,
        "seed": resumed.seed,
        "calls": resumed.calls,
    }


def ddpo(rank, folder):
    """An epoch of DDPO with AGSM, in which the second process has the best samples.

    What is trained before and after, its average, the process's samples, and those of AGSM.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["OMP_NUM_THREADS"] = "1"
    import test_trl_ddpo as one

    def better(images, prompts, metadata):
        return images.mean((1, 2, 3)) + 9 * rank, {}

    class Best(BestSamples):
        def offer(self, samples, *rest):
            super().offer(samples, *rest)
            own.extend(self.latents)

        def batch(self, *given):
            made = super().batch(*given)
            shown.append(made.latents)
            return made

    own, shown, one.trl_ddpo.BestSamples = [], [], Best
    pipe = one.pipeline(folder)
    trainer = one.AGSMDDPOTrainer(
        one.config(folder / "run"),
        better,
        one.asked,
        pipe,
        agsm=one.regularizer(0.5, candidates=InBatch(1, allow_empty=True)),
        attached=one.soft_tokens(pipe),
        best=0.5,
        batch_size=2,
    )
    assert trainer.accelerator.num_processes == 2
    started = [p.detach().clone() for p in trainer.trainable_layers]
    trainer.train()
    trained = [p.detach() for p in trainer.trainable_layers]
    return started, trained, trainer.agsm.ema.shadow, own, shown, flow_factory(rank)


def flow_factory(rank):
    """The prompts of AGSM's images in Flow-Factory: the ranks have 3 and 6, here the best ones."""
    import flow_factory_fake as fake

    sys.modules.update(fake.modules())
    from agsm_loss.integrations.hosts.flow_factory import AGSMTrainer

    samples = fake.samples(fake.Adapter())[: 3 + 3 * rank]
    for sample in samples:
        sample.prompt += f" of {rank}"
        sample.extra_kwargs["advantage"] += 9 * rank
    trainer = SimpleNamespace(
        training_args=SimpleNamespace(agsm_best=1 / 3, agsm_batch=1),
        _denoiser=SimpleNamespace(names=["prompt_embeds"]),
    )
    return [one.prompt for one in AGSMTrainer.agsm_images(trainer, samples)]
