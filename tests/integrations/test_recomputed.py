"""Outputs and gradients with tokens, against tokens put in by hand without hooks, in float64."""

import functools

import pytest
import torch
from integrations_tiny import LAYERED, TEXT, run, tiny

from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens

BANK = torch.tensor([1, 0])
T = torch.tensor([37.0, 905.0])  # what integrations_tiny gives the first two samples


def tokens_for(made, **settings):
    return make_soft_tokens(made.model, num_tokens=2, std=1.0, **settings).double()


def hooked(made, tokens, **settings):
    attached = attach_soft_tokens(made.model, tokens, **settings)
    with attached.using(BANK):
        out = run(made.model, **made.inputs())
    attached.detach()
    return out


def gradients(out, tokens):
    return torch.autograd.grad(out.square().sum(), list(tokens.parameters()))


def same(ours, theirs, tokens):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(ours, tokens), gradients(theirs, tokens), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def after_bos(text, tokens):
    return torch.cat([text[:, :1], tokens, text[:, 1:]], dim=1)


@pytest.mark.parametrize("name", ["unet", "unet_sdxl"])
@pytest.mark.parametrize("masked", [False, True])
def test_unet_everywhere_is_a_longer_prompt(name, masked):
    made = tiny(name)
    tokens, x = tokens_for(made), made.inputs()
    mask = torch.ones(2, TEXT)
    mask[1, 4:] = 0
    extra = {"encoder_attention_mask": mask} if masked else {}
    attached = attach_soft_tokens(made.model, tokens, blocks=("down", "mid", "up"))
    with attached.using(BANK):
        ours = made.model(**x, **extra)[0]
    attached.detach()
    x["encoder_hidden_states"] = after_bos(x["encoder_hidden_states"], tokens(T, BANK))
    if masked:
        extra = {"encoder_attention_mask": after_bos(mask, torch.ones(2, 2))}
    same(ours, made.model(**x, **extra)[0], tokens)


@pytest.mark.parametrize("places", [("down", "mid"), ("up",), ("down",), ("mid", "up")])
def test_unet_in_some_places(places):
    made = tiny("unet")
    tokens = tokens_for(made)
    ours = hooked(made, tokens, **({} if places == ("down", "mid") else {"blocks": places}))
    model = made.model
    blocks = {"down": list(model.down_blocks), "mid": [model.mid_block], "up": model.up_blocks}
    for place in places:
        for block in blocks[place]:
            if place != "mid" and not getattr(block, "has_cross_attention", False):
                continue

            def forward(*args, original=block.forward, **kwargs):
                text = kwargs.pop("encoder_hidden_states")
                kwargs["encoder_hidden_states"] = after_bos(text, tokens(T, BANK))
                return original(*args, **kwargs)

            block.forward = forward
    same(ours, made.model(**made.inputs())[0], tokens)


def sd3_by_hand(model, tokens, x):
    """The transformer's forward once more, with the tokens of each block written in."""
    image = model.pos_embed(x["hidden_states"])
    temb = model.time_text_embed(x["timestep"], x["pooled_projections"])
    text = model.context_embedder(x["encoder_hidden_states"])
    own = tokens(x["timestep"], BANK)
    for layer, block in enumerate(model.transformer_blocks):
        has_tokens = layer < tokens.num_layers
        joined = torch.cat([text, own[:, layer]], dim=1) if has_tokens else text
        joined, image = block(hidden_states=image, encoder_hidden_states=joined, temb=temb)
        text = joined[:, :TEXT] if joined is not None else None
    image = model.proj_out(model.norm_out(image, temb))
    image = image.reshape(2, 4, 4, 2, 2, 4)
    return torch.einsum("nhwpqc->nchpwq", image).reshape(2, 4, 8, 8)


@pytest.mark.parametrize("name", ["sd3", "sd3.5"])
@pytest.mark.parametrize("num_layers", [1, 2, -1])
def test_sd3_block_by_block(name, num_layers):
    made = tiny(name)
    tokens = tokens_for(made, num_layers=num_layers)
    theirs = sd3_by_hand(made.model, tokens, made.inputs())
    same(hooked(made, tokens), theirs, tokens)


def put_in(block, own, change):
    """Replace a block's forward by one with `own` tokens behind the text, cut off again after."""
    original = block.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        args, kwargs = change(args, kwargs, own)
        text, image = original(*args, **kwargs)
        return text[:, :TEXT], image

    block.forward = forward


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_flux_with_position_ids_of_its_own(name, num_layers):
    """The rotary rows come from the model's own `pos_embed`, of ids 0 for the tokens."""
    made = tiny(name)
    tokens, x = tokens_for(made, num_layers=num_layers), made.inputs()
    ours = hooked(made, tokens)
    ids = torch.cat([x["txt_ids"], torch.zeros_like(x["txt_ids"][:2]), x["img_ids"]])
    rope = made.model.pos_embed(ids)

    def change(args, kwargs, own):
        text = torch.cat([kwargs["encoder_hidden_states"], own], dim=1)
        return args, kwargs | {"encoder_hidden_states": text, "image_rotary_emb": rope}

    blocks = [*made.model.transformer_blocks, *made.model.single_transformer_blocks]
    for layer, block in enumerate(blocks[:num_layers]):
        put_in(block, tokens(T, BANK)[:, layer], change)
    same(ours, made.model(**x)[0], tokens)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_qwen_image_with_padded_text(num_layers, masked):
    made = tiny("qwen")
    tokens, x = tokens_for(made, num_layers=num_layers), made.inputs()
    if not masked:
        x["encoder_hidden_states_mask"] = None
    attached = attach_soft_tokens(made.model, tokens)
    with attached.using(BANK):
        ours = made.model(**x)[0]
    attached.detach()

    def change(args, kwargs, own):
        image, text = kwargs["image_rotary_emb"]
        changed = {
            "encoder_hidden_states": torch.cat([kwargs["encoder_hidden_states"], own], dim=1),
            "image_rotary_emb": (image, torch.cat([text, torch.ones_like(text[:2])])),
        }
        if masked:
            mask = kwargs["encoder_hidden_states_mask"]
            changed["encoder_hidden_states_mask"] = torch.cat([mask, mask[:, :2] | True], dim=1)
        return args, kwargs | changed

    for layer, block in enumerate(made.model.transformer_blocks[:num_layers]):
        put_in(block, tokens(T, BANK)[:, layer], change)
    same(ours, made.model(**x)[0], tokens)


def test_qwen_image_tokens_do_not_depend_on_the_padding():
    made = tiny("qwen")
    tokens, x = tokens_for(made), made.inputs()
    short = {n: x[n][:, :4] for n in ("encoder_hidden_states", "encoder_hidden_states_mask")}
    attached = attach_soft_tokens(made.model, tokens)
    long_out, short_out = made.model(**x)[0], made.model(**(x | short))[0]
    attached.detach()
    torch.testing.assert_close(long_out[1], short_out[1])  # its last two rows were padding


@pytest.mark.parametrize("num_layers", [1, 3])
def test_sana(num_layers):
    made = tiny("sana")
    tokens, x = tokens_for(made, num_layers=num_layers), made.inputs()
    ours = hooked(made, tokens)
    for layer, block in enumerate(made.model.transformer_blocks[:num_layers]):
        own = tokens(T, BANK)[:, layer]

        def forward(*args, original=block.forward, own=own):
            image, mask, text, bias, *rest = args
            bias = torch.cat([bias, torch.zeros(2, 1, 2).double()], dim=-1)
            return original(image, mask, torch.cat([text, own], dim=1), bias, *rest)

        block.forward = forward
    same(ours, made.model(**x)[0], tokens)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_z_image_with_captions_of_two_lengths(num_layers):
    made = tiny("z_image")
    tokens = tokens_for(made, num_layers=num_layers)
    ours = hooked(made, tokens)
    for layer, block in enumerate(made.model.layers[:num_layers]):
        own = tokens(T, BANK)[:, layer]

        def forward(x, mask, rope, *rest, original=block.forward, own=own):
            mask = torch.cat([mask, torch.tensor([[True] * 2] * 2)], dim=1)
            rope = torch.cat([rope, torch.ones_like(rope[:, :2])], dim=1)
            return original(torch.cat([x, own], dim=1), mask, rope, *rest)[:, :-2]

        block.forward = forward
    same(ours, run(made.model, **made.inputs()), tokens)


@pytest.mark.parametrize("name", LAYERED)
def test_every_layer_and_token_gets_a_gradient(name):
    made = tiny(name)
    tokens = tokens_for(made, num_layers=-1)
    grad = gradients(hooked(made, tokens), tokens)[0]
    assert (grad.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("t", [0, 9, 10, 999, 10.5, 1000])
@pytest.mark.parametrize("name", ["unet", "sd3", "flux", "sana", "z_image"])
def test_the_time_token_of_a_call(name, t):
    made = tiny(name)
    tokens = tokens_for(made)
    seen = []
    tokens.time_tokens.register_forward_pre_hook(lambda m, args: seen.append(args[0].tolist()))
    x = made.inputs(timestep=t)
    key = "t" if name == "z_image" else "timestep"
    before = x[key].clone()
    attached = attach_soft_tokens(made.model, tokens)
    made.model(**x)
    attached.detach()
    assert seen == [[min(int(t // 10), 99)] * 2]
    assert torch.equal(x[key], before)


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500])])
def test_one_timestep_for_the_batch(timestep):
    made = tiny("unet")
    tokens, x = tokens_for(made), made.inputs(timestep=500)
    attached = attach_soft_tokens(made.model, tokens)
    expected = made.model(**x)[0]
    got = made.model(**(x | {"timestep": timestep}))[0]
    attached.detach()
    torch.testing.assert_close(got, expected)
