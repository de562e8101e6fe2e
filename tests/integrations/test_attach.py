"""Attach, choose banks, detach: what changes, what doesn't, what is refused."""

import copy
import io
from functools import partial

import pytest
import torch
from integrations_tiny import NAMES, TEXT, run, tiny
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map

from agsm_loss import Bank, SoftTokens
from agsm_loss.integrations.denoisers import TokenDenoiser
from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens, unwrap
from agsm_loss.integrations.tokens.unet import bos_embedding


def tokens_for(made, **settings):
    return make_soft_tokens(made.model, num_tokens=2, std=1.0, **settings).double()


def hooks(model):
    return [
        (name, len(getattr(m, kind)))
        for name, m in model.named_modules()
        for kind in vars(m)
        if "hooks" in kind and isinstance(getattr(m, kind), dict)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_off_is_the_bare_model_and_detaching_restores_it(name):
    made = tiny(name)
    x, before, state = made.inputs(), hooks(made.model), dict(made.model.state_dict())
    bare = run(made.model, **x)
    attached = attach_soft_tokens(made.model, tokens_for(made))
    assert not torch.equal(run(made.model, **x), bare)
    for off in (Bank.OFF, [-1, -1], torch.tensor([-1, -1])):
        with attached.using(off):
            assert torch.equal(run(made.model, **x), bare)
    assert made.model.state_dict().keys() == state.keys()
    attached.detach()
    attached.detach()
    assert hooks(made.model) == before
    assert torch.equal(run(made.model, **x), bare)
    again = attach_soft_tokens(made.model, tokens_for(made))
    assert again.is_attached and not attached.is_attached
    attached.detach()  # of no effect on the second tokens
    assert not torch.equal(run(made.model, **x), bare)
    again.detach()


@pytest.mark.parametrize("name", NAMES)
def test_a_bank_for_each_sample(name):
    made = tiny(name)
    attached = attach_soft_tokens(made.model, tokens_for(made))
    x = made.inputs(batch=4)
    whole = {}
    for bank in Bank:
        with attached.using(bank):
            whole[bank] = run(made.model, **x)
    assert not torch.allclose(whole[Bank.POSITIVE], whole[Bank.NEGATIVE])
    mixes = [[0, 1, 1, 0], [-1, 0, 1, -1], [1, -1, -1, -1]]
    for mix in [*mixes, torch.tensor(mixes[1])]:
        with attached.using(mix):
            out = run(made.model, **x)
        for i, bank in enumerate(torch.as_tensor(mix).tolist()):
            torch.testing.assert_close(out[i], whole[Bank(bank)][i])
    attached.detach()


def test_positive_is_the_default_and_using_nests_and_restores():
    made = tiny("sd3")
    attached = attach_soft_tokens(made.model, tokens_for(made))
    assert attached.bank == Bank.POSITIVE
    with attached.using(Bank.NEGATIVE):
        with pytest.raises(KeyError), attached.using(Bank.OFF):
            raise KeyError
        assert attached.bank == Bank.NEGATIVE
    assert attached.bank == Bank.POSITIVE
    attached.detach()


def test_a_function_of_the_batch_size():
    made = tiny("sd3")
    attached = attach_soft_tokens(made.model, tokens_for(made))
    x = made.inputs(batch=4)
    with attached.using([1, 1, 0, 0]):
        expected = made.model(**x)[0]
    attached.bank = lambda batch: [1] * (batch // 2) + [0] * (batch // 2)
    assert torch.equal(made.model(**x)[0], expected)
    attached.detach()


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_has_the_tokens_and_its_own(name, copied):
    made = tiny(name)
    tokens, x = tokens_for(made), made.inputs()
    bare = run(made.model, **x)
    attached = attach_soft_tokens(made.model, tokens)
    with attached.using(Bank.NEGATIVE):
        expected, copy_ = run(made.model, **x), copied(made.model)
    assert torch.equal(run(copy_, **x), expected)
    other = copy_._agsm_attached
    assert other.model is copy_ and other.tokens is not tokens
    other.bank = Bank.POSITIVE
    with torch.no_grad():
        tokens.tokens.normal_()  # the original's, alone
    assert not torch.allclose(run(made.model, **x), run(copy_, **x))
    attached.detach()
    assert torch.equal(run(made.model, **x), bare) and not torch.allclose(run(copy_, **x), bare)
    other.detach()
    assert torch.equal(run(copy_, **x), bare)


def test_an_averaged_model_has_averaged_tokens():
    made = tiny("sd3")
    denoiser = TokenDenoiser(made.model, tokens=tokens_for(made))
    average = AveragedModel(denoiser)
    noisy, times = torch.randn(2, 4, 8, 8).double(), torch.tensor([10.0, 900.0]).double()
    x = made.inputs()
    text = {"prompt_embeds": x["encoder_hidden_states"],
            "pooled_prompt_embeds": x["pooled_projections"]}  # fmt: skip
    given = noisy, times, text, Bank.NEGATIVE
    assert torch.equal(average(*given), denoiser(*given))
    average.update_parameters(denoiser)
    with torch.no_grad():
        denoiser.tokens.tokens.add_(1.0)
        before = denoiser.tokens.tokens.clone()
        average.update_parameters(denoiser)
        expected = average.module.tokens.tokens
        torch.testing.assert_close(expected, before - 0.5)
        denoiser.tokens.tokens.copy_(expected)
    assert torch.equal(average(*given), denoiser(*given))


def test_return_dict_is_kept_also_when_samples_are_split():
    made = tiny("sd3")
    attached = attach_soft_tokens(made.model, tokens_for(made))
    x = made.inputs() | {"return_dict": True}
    with attached.using([-1, 1]):
        out = made.model(**x)
    assert type(out).__name__ == "Transformer2DModelOutput" and out.sample.shape == (2, 4, 8, 8)
    attached.detach()


def test_a_failed_call_leaves_nothing_behind():
    made = tiny("sd3")
    attached = attach_soft_tokens(made.model, tokens_for(made))
    x = made.inputs()
    expected = made.model(**x)[0]
    for broken in ({"pooled_projections": None}, {"hidden_states": x["hidden_states"][:, :2]}):
        with pytest.raises((RuntimeError, TypeError, AttributeError)):
            made.model(**(x | broken))
    with attached.using([-1, 0]), pytest.raises((RuntimeError, TypeError, AttributeError)):
        made.model(**(x | {"pooled_projections": None}))
    assert torch.equal(made.model(**x)[0], expected)
    attached.detach()


def record(module, seen, name="encoder_hidden_states"):
    def look(module, args, kwargs):
        text = kwargs.get(name)
        seen.append(args[1] if text is None else text)

    return module.register_forward_pre_hook(look, with_kwargs=True)


def test_positions_in_a_unet_are_bos_tokens_text():
    made = tiny("unet")
    tokens, x = tokens_for(made), made.inputs()
    attached = attach_soft_tokens(made.model, tokens)
    inside, outside = [], []
    record(made.model.down_blocks[1], inside)
    record(made.model.mid_block, inside)
    record(made.model.up_blocks[0], outside)
    made.model(**x)
    text, own = x["encoder_hidden_states"], tokens(x["timestep"])
    expected = torch.cat([text[:, :1], own, text[:, 1:]], dim=1)
    assert len(inside) == 2 and all(torch.equal(got, expected) for got in inside)
    assert len(outside) == 1 and torch.equal(outside[0], text)
    attached.detach()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_positions_in_sd3_are_text_tokens(checkpointing):
    made = tiny("sd3")
    if checkpointing:
        made.model.train().enable_gradient_checkpointing()
    tokens, x = tokens_for(made, num_layers=2), made.inputs()
    attached = attach_soft_tokens(made.model, tokens)
    seen = []
    handles = [record(block, seen) for block in made.model.transformer_blocks]
    made.model(**x)
    own = tokens(x["timestep"])
    assert [s.shape[1] for s in seen] == [TEXT + 2, TEXT + 2, TEXT]
    assert torch.equal(seen[0][:, :TEXT], made.model.context_embedder(x["encoder_hidden_states"]))
    for layer in range(2):
        assert torch.equal(seen[layer][:, TEXT:], own[:, layer])
    [handle.remove() for handle in handles]
    attached.detach()


def cast(dtype, leaf):
    floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.to(dtype) if floating else leaf


@pytest.mark.parametrize("name", ["unet", "sd3", "flux", "flux2", "qwen", "sana", "z_image"])
def test_float32_tokens_in_a_bfloat16_model(name):
    tokens = make_soft_tokens(tiny(name).model, num_tokens=2, std=1.0)

    def computed(dtype, bank):
        made = tiny(name, dtype)
        x = {n: v if n in ("timestep", "t") else tree_map(partial(cast, dtype), v)
             for n, v in made.inputs().items()}  # fmt: skip
        attached = attach_soft_tokens(made.model, tokens)
        with attached.using(bank):
            return run(made.model, **x)

    def error(bank):
        exact = computed(torch.float64, bank)
        return float(
            (computed(torch.bfloat16, bank) - exact).detach().norm() / exact.detach().norm()
        )

    out = computed(torch.bfloat16, Bank.POSITIVE)
    assert out.dtype == torch.bfloat16 and tokens.tokens.dtype == torch.float32
    out.float().sum().backward()
    assert tokens.tokens.grad.isfinite().all() and tokens.tokens.grad[0].abs().max() > 0
    assert error(Bank.POSITIVE) < 3 * error(Bank.OFF)


def test_sizes_of_made_tokens():
    assert make_soft_tokens(tiny("unet").model).tokens.shape == (2, 4, 16)
    assert make_soft_tokens(tiny("sd3").model).tokens.shape == (2, 3, 4, 24)
    assert make_soft_tokens(tiny("sd3").model, num_layers=1).tokens.shape == (2, 1, 4, 24)
    assert make_soft_tokens(tiny("flux").model, num_layers=-1).tokens.shape == (2, 3, 4, 24)
    start = bos_embedding(torch.arange(32.0).reshape(1, 2, 16))
    tokens = make_soft_tokens(tiny("unet").model, init=start)
    assert (tokens.tokens == torch.arange(16.0)).all()


def test_wrapped_models_are_unwrapped():
    made = tiny("sd3")
    assert unwrap(torch.compile(made.model)) is made.model
    attached = attach_soft_tokens(torch.compile(made.model), tokens_for(made))
    assert attached.model is made.model
    attached.detach()


def test_refusals():
    made = tiny("sd3")
    with pytest.raises(RuntimeError, match=r"attached already. Call detach\(\)"):
        [attach_soft_tokens(made.model, tokens_for(made)) for _ in range(2)]
    unet = tiny("unet")
    with pytest.raises(ValueError, match=r"expected dim=16, the text width .*got dim=24"):
        attach_soft_tokens(unet.model, SoftTokens(24))
    with pytest.raises(ValueError, match=r"expected num_layers=None.*got num_layers=2"):
        attach_soft_tokens(unet.model, SoftTokens(16, num_layers=2))
    with pytest.raises(ValueError, match=r"blocks: expected some of"):
        attach_soft_tokens(unet.model, SoftTokens(16), blocks=("left",))
    with pytest.raises(ValueError, match=r"num_layers: expected None"):
        make_soft_tokens(unet.model, num_layers=2)
    sana = tiny("sana")
    for layers in (None, 4):
        with pytest.raises(ValueError, match=rf"num_layers in 1..3, .*got num_layers={layers}"):
            attach_soft_tokens(sana.model, SoftTokens(24, num_layers=layers))
    with pytest.raises(ValueError, match=r"num_layers: expected -1 or 1..3"):
        make_soft_tokens(sana.model, num_layers=0)
    with pytest.raises(ValueError, match=r"blocks: expected None for SanaTransformer2DModel"):
        attach_soft_tokens(sana.model, SoftTokens(24, num_layers=1), blocks=("down",))
    with pytest.raises(TypeError, match=r"no soft tokens for Linear. Supported: UNet2D.*Backbone"):
        attach_soft_tokens(nn.Linear(2, 2), SoftTokens(4))


def test_bad_banks():
    made = tiny("sd3")
    attached = attach_soft_tokens(made.model, tokens_for(made))
    with pytest.raises(ValueError, match=r"expected values of agsm_loss.Bank"):
        attached.bank = 2
    with pytest.raises(ValueError, match="integer tensor"):
        attached.bank = torch.zeros(2)
    with attached.using([0, 1, 0]), pytest.raises(ValueError, match="call's 2 samples, got 3"):
        made.model(**made.inputs())
    with pytest.raises(ValueError, match="timestep: expected one, or one for each of the 2"):
        made.model(**(made.inputs() | {"timestep": torch.zeros(3)}))
    attached.detach()


def test_skipping_a_block_that_has_tokens_is_refused():
    """As SD3.5's skip-layer guidance does, with later blocks: the text would stay too long."""
    made, x = tiny("sd3"), tiny("sd3").inputs()
    number = len(made.model.transformer_blocks)
    tokens = make_soft_tokens(made.model, num_layers=number - 1).double()
    attached = attach_soft_tokens(made.model, tokens)
    with pytest.raises(ValueError, match=r"skip_layers: expected none of the first"):
        made.model(**x, skip_layers=[0])
    later = made.model(**x, skip_layers=[number - 1])[0]
    assert not torch.equal(later, made.model(**x)[0])
    with attached.using(Bank.OFF):
        off = made.model(**x, skip_layers=[0])[0]
    attached.detach()
    assert torch.equal(made.model(**x, skip_layers=[0])[0], off)
