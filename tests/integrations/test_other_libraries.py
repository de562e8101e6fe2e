"""Together with what users have on their models: LoRA, attention processors, torch.compile, DDP."""

import compile_backbones_check
import fresh
import pytest
import torch
import workers
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.models.attention_processor import AttnProcessor
from integrations_tiny import run, tiny
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from ranks import run_ranks

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, InBatch
from agsm_loss.integrations.denoisers import TokenDenoiser
from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens


def attach(made):
    tokens = make_soft_tokens(made.model, num_tokens=2, std=1.0).double()
    return tokens, attach_soft_tokens(made.model, tokens)


@pytest.mark.parametrize("name", ["unet", "sd3", "flux", "flux2", "z_image"])
@pytest.mark.parametrize("attach_first", [False, True])
def test_lora_on_off_and_fused(name, attach_first):
    made, x = tiny(name), tiny(name).inputs()
    tokens, attached = attach(made)
    bare = run(made.model, **x)
    if not attach_first:
        attached.detach()
    torch.manual_seed(1)
    made.model.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    made.model.double()
    if not attach_first:
        attached = attach_soft_tokens(made.model, tokens)
    adapted = run(made.model, **x)
    assert not torch.allclose(adapted, bare)
    adapted.sum().backward()
    grads = [p.grad for n, p in made.model.named_parameters() if "lora_" in n and p.requires_grad]
    assert len(grads) > 0 and all(g is not None and g.abs().max() > 0 for g in grads)
    assert tokens.tokens.grad.abs().max() > 0
    made.model.disable_adapters()
    assert torch.equal(run(made.model, **x), bare)
    made.model.enable_adapters()
    made.model.fuse_lora()
    torch.testing.assert_close(run(made.model, **x), adapted)
    attached.detach()


def test_attention_slicing_and_processors():
    made, x = tiny("unet"), tiny("unet").inputs()
    _, attached = attach(made)
    expected = made.model(**x)[0]
    made.model.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(made.model(**x)[0], expected)
    made.model.set_attention_slice(1)
    torch.testing.assert_close(made.model(**x)[0], expected)
    attached.detach()


@pytest.mark.slow
def test_compiled_equals_eager():
    """In a fresh process, because executed shape annotations cannot be traced."""
    done = fresh.run(compile_backbones_check.main)
    assert done.told.split() == ["unet", "sd3", "flux", "qwen", "sana", "z_image"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_ranks_of_ddp_equal_one_process(checkpointing):
    """Two forwards of other banks before one backward, on each half of the batch."""
    worker = workers.ddp_checkpointed if checkpointing else workers.ddp_plain
    whole = workers.token_gradients(batch=4)
    for grads in run_ranks(worker).values():
        for ours, theirs in zip(grads, whole, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_script_that_checkpoints_its_lora_alone_resumes_exactly(tmp_path):
    """Its tokens are registered, as in the patch guide; the second process draws others."""

    def make(seed):
        model = tiny("unet").model.float().requires_grad_(False)
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="gaussian"))
        model.soft_tokens = make_soft_tokens(model)
        attached = attach_soft_tokens(model, model.soft_tokens)
        trained = [p for p in model.parameters() if p.requires_grad]
        project = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)
        accelerator = Accelerator(cpu=True, project_config=project)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
        agsm = AGSMRegularizer(
            TokenDenoiser(model, tokens=attached), EMA(trained, decay=0.5), AGSMLoss(neg_scale=0.0),
            candidates=InBatch(1, allow_empty=True),
        )  # fmt: skip
        accelerator.register_for_checkpointing(agsm, attached.tokens)

        def save(models, weights, folder):
            torch.save(get_peft_model_state_dict(model), f"{folder}/lora.pt")
            weights.clear()

        def load(models, folder):
            set_peft_model_state_dict(model, torch.load(f"{folder}/lora.pt"))
            models.clear()

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)
        return accelerator, optimizer, agsm, trained

    def run(optimizer, agsm, steps):
        for step in steps:
            g = torch.Generator().manual_seed(step)
            noisy, target = torch.randn(2, 4, 4, 8, 8, generator=g)
            text = {"prompt_embeds": torch.randn(4, 6, 16, generator=g)}
            times = torch.tensor([1, 300, 600, 900])
            agsm(noisy, times, target, text, ["a", "b", "c", ""]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            agsm.update_ema()

    _, optimizer, agsm, straight = make(1)
    run(optimizer, agsm, range(4))
    accelerator, optimizer, agsm, _ = make(1)
    run(optimizer, agsm, range(2))
    accelerator.save_state()
    accelerator, optimizer, agsm, resumed = make(99)
    accelerator.load_state(str(tmp_path / "checkpoints" / "checkpoint_0"))
    run(optimizer, agsm, range(2, 4))
    for ours, theirs in zip(resumed, straight, strict=True):
        assert torch.equal(ours, theirs)
