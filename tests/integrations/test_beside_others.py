"""Beside what users have on their models: LoRA, attention processors, torch.compile, DDP."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import workers
from diffusers.models.attention_processor import AttnProcessor
from integrations_tiny import tiny
from peft import LoraConfig
from workers import run_ranks

from agsm_loss.integrations.attach import attach_soft_tokens, make_soft_tokens


def attach(made):
    tokens = make_soft_tokens(made.model, num_tokens=2, std=1.0).double()
    return tokens, attach_soft_tokens(made.model, tokens)


@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
@pytest.mark.parametrize("attach_first", [False, True])
def test_lora_on_off_and_fused(name, attach_first):
    made, x = tiny(name), tiny(name).inputs()
    tokens, attached = attach(made)
    bare = made.model(**x)[0]
    if not attach_first:
        attached.detach()
    torch.manual_seed(1)
    made.model.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    made.model.double()
    if not attach_first:
        attached = attach_soft_tokens(made.model, tokens)
    adapted = made.model(**x)[0]
    assert not torch.allclose(adapted, bare)
    adapted.sum().backward()
    grads = [p.grad for n, p in made.model.named_parameters() if "lora_" in n and p.requires_grad]
    assert len(grads) > 0 and all(g is not None and g.abs().max() > 0 for g in grads)
    assert tokens.tokens.grad.abs().max() > 0
    made.model.disable_adapters()
    assert torch.equal(made.model(**x)[0], bare)
    made.model.enable_adapters()
    made.model.fuse_lora()
    torch.testing.assert_close(made.model(**x)[0], adapted)
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


def test_compiled_equals_eager():
    """In a fresh process, because executed shape annotations cannot be traced."""
    script = Path(__file__).parent.parent / "compile_backbones_check.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["unet", "sd3", "flux", "qwen", "sana"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_ranks_of_ddp_equal_one_process(checkpointing):
    """Two forwards of other banks before one backward, on each half of the batch."""
    worker = workers.ddp_checkpointed if checkpointing else workers.ddp_plain
    whole = workers.token_gradients(batch=4)
    for grads in run_ranks(worker).values():
        for ours, theirs in zip(grads, whole, strict=True):
            torch.testing.assert_close(ours, theirs)
