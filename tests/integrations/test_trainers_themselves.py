"""AGSM in the trainers that people use, where they are.

TRAINERS names a folder with clones, called as on GitHub: DiffSynth-Studio, ai-toolkit, sd-scripts,
diffusers. What of theirs is not installed is a skip, or where it says so a stand-in.
"""

import hashlib
import inspect
import os
import runpy
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from pipelines_tiny import text_parts, vae
from readme import ROOT
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from agsm_loss import AGSMLoss
from agsm_loss.integrations.trainers import ai_toolkit, sd_scripts


def clone(name):
    folder = os.environ.get("TRAINERS")
    path = Path(folder or "") / name
    if folder is None or not path.is_dir():
        pytest.skip(f"TRAINERS names no folder with a clone of {name}")
    return path.resolve()


def both(loss, weights):
    return loss.detach(), torch.autograd.grad(loss, weights)


@pytest.fixture
def fresh(monkeypatch):
    """Python's paths, arguments and modules, and accelerate's state, are after as before."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# DiffSynth-Studio


class Letters:
    """As Qwen's tokenizer, of letters."""

    def apply_chat_template(self, messages, **_):
        return f"u:{messages[0]['content']}:a"

    def __call__(self, texts, max_length, **_):
        ids = torch.tensor([[ord(c) % 64 for c in one.ljust(64)[:64]] for one in texts])
        mask = torch.tensor([[i < len(one) for i in range(64)] for one in texts])
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


def tiny_z_image():
    from diffsynth.models.z_image_dit import ZImageDiT
    from diffsynth.pipelines.z_image import ZImagePipeline as Pipeline

    torch.manual_seed(0)
    pipe = Pipeline(device="cpu", torch_dtype=torch.float32)
    pipe.dit = ZImageDiT(
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[512, 64, 64],
    )  # fmt: skip
    pipe.dit.t_embedder.bfloat16()  # it casts its input to bfloat16; the rest is float32 here
    pipe.dit.t_embedder.register_forward_hook(lambda module, given, output: output.float())
    for name in ("x_pad_token", "cap_pad_token"):
        nn.init.zeros_(getattr(pipe.dit, name))
    config = Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    pipe.text_encoder, pipe.tokenizer = Qwen3Model(config), Letters()
    pipe.vae_encoder = nn.Conv2d(3, 16, kernel_size=8, stride=8)  # in its place
    return pipe


STUDIO_LINES = """
    from agsm_loss.integrations.trainers.diffsynth_studio import train_guidance
    train_guidance(model, guidance_scale={})
"""


def images_in(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_in_diffsynth_studio_itself(fresh, tmp_path, monkeypatch):
    """Z-Image's train.py with the guide's lines: a tiny model, four steps of a LoRA."""
    root = clone("DiffSynth-Studio")
    sys.path.insert(0, str(root))
    z_image = pytest.importorskip("diffsynth.pipelines.z_image")
    monkeypatch.setattr(
        z_image.ZImagePipeline, "from_pretrained", staticmethod(lambda **_: tiny_z_image())
    )
    script = (root / "examples/z_image/model_training/train.py").read_text()
    before, mark, after = script.partition("    model_logger = ModelLogger(")
    images = images_in(tmp_path / "images")
    (images / "metadata.csv").write_text("image,prompt\n0.png,a cat\n1.png,a dog\n")

    rows = ["--dataset_metadata_path", str(images / "metadata.csv"), "--dataset_repeat", "2"]

    def trained(lines, data=(images, *rows), task="sft", out="out"):
        (tmp_path / "train.py").write_text(before + lines + mark + after)
        sys.argv = [
            "train.py", "--dataset_base_path", *map(str, data), "--task", task, "--height", "32",
            "--width", "32", "--lora_base_model", "dit", "--lora_target_modules", "to_q,to_k,to_v",
            "--lora_rank", "4", "--learning_rate", "1e-2", "--output_path", str(tmp_path / out),
        ]  # fmt: skip
        torch.manual_seed(1)
        return runpy.run_path(str(tmp_path / "train.py"), run_name="__main__")["model"]

    plain, one, three = trained(""), *(trained(STUDIO_LINES.format(s)) for s in (1, 3))
    weights = [[p.detach() for p in model.trainable_modules()] for model in (plain, one, three)]
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not any(map(torch.equal, weights[0], weights[2]))

    image = Image.open(images / "0.png").convert("RGB")
    parameters = list(three.trainable_modules())
    torch.manual_seed(2)
    value, grads = both(three({"image": image, "prompt": "a cat"}), parameters)
    # Its PR 1650's prediction, (v + (s − 1)u)/s, in its own loss.
    shared, posi, nega = three.get_pipeline_inputs({"image": image, "prompt": "a cat"})
    inputs = (shared, posi, nega)
    torch.manual_seed(2)
    for unit in three.pipe.units:
        inputs = three.pipe.unit_runner(unit, three.pipe, *inputs)
    model_fn = three.pipe.model_fn

    def guidance_free(**given):
        with torch.no_grad():
            null = model_fn(**{**given, **inputs[2]})
        return (model_fn(**given) + 2 * null) / 3

    three.pipe.model_fn = guidance_free
    value_free, grads_free = both(plain.task_to_loss["sft"](three.pipe, *inputs), parameters)
    torch.testing.assert_close(value, value_free)
    torch.testing.assert_close(grads, tuple(3 * one for one in grads_free))
    print(f"DiffSynth-Studio: {value:.9f} {value_free:.9f}")

    # Split training: the first stage caches the encoded negative prompt too.
    lines, cache = STUDIO_LINES.format(3), tmp_path / "cache"
    trained(lines, task="sft:data_process", out="cache")
    for file in cache.rglob("*.pth"):
        _, posi, nega = torch.load(file, weights_only=False)
        assert posi["prompt_embeds"][0].shape != nega["prompt_embeds"][0].shape
    in_stages = trained(lines, data=[cache, "--dataset_repeat", "2"], task="sft:train")
    after = [p.detach() for p in in_stages.trainable_modules()]
    assert not any(map(torch.equal, after, weights[0]))


# sd-scripts


def tiny_scripts_trainer(train_network, strategy_sd):
    """sd-scripts' trainer of SD1.5 that loads a tiny model."""

    class Tiny(train_network.NetworkTrainer):
        def load_target_model(self, args, weight_dtype, accelerator):
            torch.manual_seed(0)
            unet = UNet2DConditionModel(
                sample_size=8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
                cross_attention_dim=16, attention_head_dim=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            )  # fmt: skip
            self.tiny = text_parts()
            return "sd_v1", self.tiny[1], vae(), unet

        def get_tokenize_strategy(self, args):
            strategy = strategy_sd.SdTokenizeStrategy.__new__(strategy_sd.SdTokenizeStrategy)
            strategy.tokenizer = text_parts()[0]
            strategy.max_length = strategy.tokenizer.model_max_length
            return strategy

        def post_process_network(self, args, accelerator, network, text_encoders, unet):
            self.network = network

    return Tiny


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_in_sd_scripts_itself(fresh, tmp_path, monkeypatch):
    """train_network.py with the guide's lines: a tiny SD1.5, three steps of a LoRA."""
    root = clone("sd-scripts")
    sys.path.insert(0, str(root))
    import transformers

    # In transformers 5 it has another name.
    monkeypatch.setattr(
        transformers, "CLIPFeatureExtractor", transformers.CLIPImageProcessor, raising=False
    )
    train_network = pytest.importorskip("train_network", exc_type=ImportError)
    strategy_sd = pytest.importorskip("library.strategy_sd")
    tiny = tiny_scripts_trainer(train_network, strategy_sd)
    images = images_in(tmp_path / "1_cat")
    for i, caption in enumerate(("a red circle", "two blue squares")):
        (images / f"{i}.txt").write_text(caption)

    def trained(kind, **attributes):
        parser = train_network.setup_parser()
        args = parser.parse_args([
            "--pretrained_model_name_or_path", "tiny", "--train_data_dir", str(tmp_path),
            "--caption_extension", ".txt", "--resolution", "32", "--output_dir",
            str(tmp_path / "out"), "--network_module", "networks.lora", "--network_dim", "4",
            "--max_train_steps", "3", "--train_batch_size", "2", "--learning_rate", "1e-2",
            "--mixed_precision", "no", "--seed", "1", "--max_data_loader_n_workers", "0",
            "--save_model_as", "safetensors",
        ])  # fmt: skip
        trainer = type("Trainer", (*kind, tiny), attributes)()
        trainer.train(args)
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in ("Tokenize", "TextEncoding", "LatentsCaching", "TextEncoderOutputsCaching"):
            getattr(train_network.strategy_base, f"{name}Strategy")._strategy = None
        return trainer, [p.detach().clone() for p in trainer.network.parameters()]

    seen = []

    class Checked(sd_scripts.AGSMNetworkTrainer):
        """Compares the loss of each batch with AGSM's of sd-scripts' own predictions."""

        def get_noise_pred_and_target(self, *args, **kwargs):
            state = torch.get_rng_state()
            unguided, target, *rest = super().get_noise_pred_and_target(*args, **kwargs)
            given = inspect.signature(tiny.get_noise_pred_and_target).bind(self, *args, **kwargs)
            null = [one.expand(len(target), -1, -1) for one in self._encode_null()]
            preds = []
            for conds in (given.arguments["text_encoder_conds"], null):
                torch.set_rng_state(state)
                given.arguments["text_encoder_conds"] = conds
                preds.append(tiny.get_noise_pred_and_target(*given.args, **given.kwargs)[0])
            pred = torch.stack(preds, dim=1)
            expected = AGSMLoss(guidance_scale=3)(pred, pred.detach(), target)
            weights = [p for p in self.network.parameters() if p.requires_grad]
            got = torch.nn.functional.mse_loss(unguided, target)
            seen.append(
                [
                    (
                        loss.detach(),
                        torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True),
                    )
                    for loss in (got, expected)
                ]
            )
            return (unguided, target, *rest)

    ours = (sd_scripts.AGSMNetworkTrainer,)
    _, plain = trained(())
    _, one = trained(ours, guidance_scale=1)
    _, three = trained(ours, guidance_scale=3)
    trained((Checked,), guidance_scale=3)
    assert all(map(torch.equal, plain, one)) and not all(map(torch.equal, plain, three))
    assert len(seen) == 3
    for got, expected in seen:
        torch.testing.assert_close(got, expected)
    print(f"sd-scripts: {[[float(one[0]) for one in pair] for pair in seen]}")


# ai-toolkit


def stand_in(monkeypatch, *names):
    """Modules of these names that have everything, where they are not installed."""
    for name in names:
        if find_spec(name) is None:
            module = MagicMock(__spec__=ModuleSpec(name, None), __path__=[])
            monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize("scale", [1, 3])
def test_in_ai_toolkit_itself(scale, fresh, monkeypatch):
    """Its predict_noise and calculate_loss of a tiny model; three steps, and form A."""
    root = clone("ai-toolkit")
    sys.path.insert(0, str(root))
    stand_in(monkeypatch, "torchaudio", "albumentations", "av", "lycoris")
    trainers = pytest.importorskip(
        "extensions_built_in.sd_trainer.DiffusionTrainer", exc_type=ImportError
    )
    from toolkit.config_modules import TrainConfig
    from toolkit.prompt_utils import PromptEmbeds

    def made(kind, **train):
        """A trainer without a job: what its prediction and its loss read."""
        torch.manual_seed(0)
        one = kind.__new__(kind)
        one.train_config = TrainConfig(dtype="float32", **train)
        one.device_torch, one.additional_logs = torch.device("cpu"), {}
        one.dfe = one.adapter = None
        layer = one.layer = nn.Linear(4 + 3, 4)

        def predict_noise(latents, conditional_embeddings, timestep, **_):
            text = conditional_embeddings.text_embeds.mean(1)[:, :, None, None]
            inputs = torch.cat([latents, text.expand(-1, -1, *latents.shape[2:])], dim=1)
            pred = layer(inputs.movedim(1, -1)).movedim(-1, 1).tanh()
            return pred * (1 + timestep.view(-1, 1, 1, 1) / 1000)

        one.sd = SimpleNamespace(
            predict_noise=predict_noise, is_flow_matching=True, prediction_type="flow",
            scale_loss=lambda loss: loss,
        )  # fmt: skip
        one.unconditional_embeds = PromptEmbeds(torch.randn(1, 5, 3))
        one._guidance_loss_target_batch = 3.0
        return one

    def loss(one, preserve=False):
        noise, latents = torch.randn(2, 2, 4, 8, 8)
        timesteps = torch.tensor([300.0, 800.0])
        sigma = timesteps.view(-1, 1, 1, 1) / 1000
        batch = SimpleNamespace(
            latents=latents, mask_tensor=torch.zeros(2, 1, 8, 8), loss_multiplier_list=[1.0, 0.5],
            audio_pred=None, audio_target=None, audio_pred_slot=None,
            get_is_reg_list=lambda: [preserve, preserve],
        )  # fmt: skip
        noisy = (1 - sigma) * latents + sigma * noise
        given = {
            "noisy_latents": noisy, "timesteps": timesteps, "batch": batch,
            "conditional_embeds": PromptEmbeds(torch.randn(2, 5, 3)), "unconditional_embeds": None,
        }  # fmt: skip
        pred = one.predict_noise(**given, is_primary_pred=True)
        inputs = pred, noise, noisy, timesteps, batch
        if preserve:  # as at the first step, where the model is the prior
            prior = one.predict_noise(**given).detach()
            return one.calculate_loss(*inputs, mask_multiplier=batch.mask_tensor, prior_pred=prior)
        return one.calculate_loss(*inputs, mask_multiplier=torch.rand(2, 4, 8, 8))

    def first_loss(one):
        torch.manual_seed(1)
        return both(loss(one), list(one.layer.parameters()))

    def trained(one):
        torch.manual_seed(2)
        optimizer = torch.optim.AdamW(one.layer.parameters(), lr=1e-2)
        for _ in range(3):
            loss(one).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in one.layer.parameters()]

    kind = ai_toolkit.AI_TOOLKIT_EXTENSIONS[0].get_process()
    ours = made(kind)
    ours.agsm_guidance_scale = scale
    plain = made(trainers.DiffusionTrainer)
    if scale == 1:
        assert all(map(torch.equal, trained(ours), trained(plain)))
        return
    for inverted in (False, True):  # regularisation images; a background
        kept = made(kind, inverted_mask_prior=inverted)
        kept.agsm_guidance_scale = scale
        assert loss(kept, preserve=True) < 1e-12
    value, grads = first_loss(ours)
    value_a, grads_a = first_loss(made(trainers.DiffusionTrainer, do_guidance_loss=True))
    print(f"ai-toolkit: {value:.9f} {value_a:.9f} {value_a / value:.9f}")
    torch.testing.assert_close(9 * value, value_a)
    torch.testing.assert_close(tuple(3 * one for one in grads), grads_a)
    assert not any(map(torch.equal, trained(ours), trained(plain)))


# diffusers' scripts, with the patches


def speaking(kind, transformer, vae, text, **config):
    """A tiny pipeline of Z-Image or FLUX.2-klein, with a tokenizer of bytes."""
    symbols = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={one: i for i, one in enumerate(symbols)}, merges=[])
    tokenizer.chat_template = "u:{{ messages[0]['content'] }}"
    sizes = Qwen3Config(
        vocab_size=len(symbols), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=text(sizes),
        tokenizer=tokenizer, transformer=transformer, **config,
    )  # fmt: skip


def tiny_pipeline_z_image():
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[512, 64, 64],
    )  # fmt: skip
    for name in ("x_pad_token", "cap_pad_token"):
        nn.init.zeros_(getattr(transformer, name))
    return speaking(ZImagePipeline, transformer, vae(), Qwen3Model)


def tiny_pipeline_flux2_klein():
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    coder = AutoencoderKLFlux2(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",), latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    return speaking(Flux2KleinPipeline, transformer, coder, Qwen3ForCausalLM, is_distilled=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize("name", ["z_image", "flux2_klein"])
def test_in_diffusers_scripts_themselves(name, fresh, tmp_path, monkeypatch):
    """The patched script on a tiny model: three steps of a LoRA, without the patch and with it."""
    script = f"examples/dreambooth/train_dreambooth_lora_{name}.py"
    patch = ROOT / f"integrations/patches/diffusers_{name}.diff"
    upstream = (clone("diffusers") / script).read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(upstream) + upstream).hexdigest()
    if f"index {blob}.." not in patch.read_text():
        pytest.skip(f"the clone's {script} is not that of the patch's commit")
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    globals()[f"tiny_pipeline_{name}"]().save_pretrained(tmp_path / "pipeline")
    images = images_in(tmp_path / "images")
    (tmp_path / script).parent.mkdir(parents=True)
    (tmp_path / script).write_bytes(upstream)
    plain = upstream.decode()
    subprocess.run(["git", "apply", "--unidiff-zero", patch], check=True, cwd=tmp_path)
    patched = (tmp_path / script).read_text()
    losses, grads = [], []
    backward = Accelerator.backward

    def recorded(self, loss, **kwargs):
        losses.append(loss.item())
        backward(self, loss, **kwargs)
        weights = self._models[0].parameters()
        grads.append(torch.cat([p.grad.flatten() for p in weights if p.requires_grad]))

    monkeypatch.setattr(Accelerator, "backward", recorded)

    def trained(text):
        (tmp_path / "train.py").write_text(text)
        losses.clear()
        grads.clear()
        sys.argv = [
            "train.py",
            "--pretrained_model_name_or_path", str(tmp_path / "pipeline"), "--instance_data_dir",
            str(images), "--instance_prompt", "a red circle", "--resolution", "16",
            "--train_batch_size", "1", "--max_train_steps", "3", "--learning_rate", "1e-2",
            "--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--max_sequence_length", "16",
            "--seed", "0", "--mixed_precision", "no", "--output_dir", str(tmp_path / "out"),
            "--skip_final_inference", "--report_to", "tensorboard",
            *(["--text_encoder_out_layers", "1"] if name == "flux2_klein" else []),
        ]  # fmt: skip
        runpy.run_path(str(tmp_path / "train.py"), run_name="__main__")
        AcceleratorState._reset_state(reset_partial_state=True)
        saved = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
        return list(saved.values()), (losses[0], grads[0].clone())

    ours = "undo_guidance(model_pred, null_pred, guidance_scale=3)"
    assert patched.count(ours) == 1
    without, _ = trained(plain)
    one, _ = trained(patched.replace("guidance_scale=3", "guidance_scale=1"))
    three, (value, grad) = trained(patched)
    _, (value_free, grad_free) = trained(patched.replace(ours, "(model_pred + 2 * null_pred) / 3"))
    assert all(map(torch.equal, one, without))
    assert not all(map(torch.equal, three, without))
    print(f"{name}: {value:.9f} {value_free:.9f} {(grad.norm() / grad_free.norm()).item():.9f}")
    assert value == pytest.approx(value_free, rel=1e-5)
    torch.testing.assert_close(grad, 3 * grad_free, rtol=1e-4, atol=1e-6)
