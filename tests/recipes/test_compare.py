"""One prompt on one noise in two ways: what `compare.py` shows."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import compare
import generate
from agsm_loss.integrations.denoisers import TokenDenoiser
from agsm_loss.integrations.tokens.pipelines import Sampling
from common.comparison import Comparison, Way
from common.pipeline import TextToImage
from world.architectures import pipeline_arguments
from world.geneval_folder import pixels


def _loaded(model):
    return TextToImage.load(str(model), torch.float32, "cpu", pipeline_arguments)


@pytest.fixture(scope="module")
def saved(flow_base, tmp_path_factory):
    """A folder of tokens and a LoRA that change the model."""
    folder = tmp_path_factory.mktemp("compared")
    model = _loaded(flow_base)
    denoiser = TokenDenoiser(model.denoiser, num_tokens=2)
    torch.nn.init.normal_(denoiser.tokens.tokens, std=3.0)
    denoiser.save_pretrained(folder / "tokens")
    denoiser.detach()
    model.add_lora(2)
    for name, weight in model.denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_lora(folder / "lora")
    return folder


@pytest.fixture(scope="module")
def comparison(flow_base, saved):
    model = _loaded(flow_base)
    return Comparison(model, tokens=str(saved / "tokens"), lora=str(saved / "lora"))


@pytest.mark.parametrize("tokens", ["off", "both"])
@pytest.mark.parametrize("lora", [False, True])
def test_each_way_is_what_generate_makes(comparison, flow_base, saved, tokens, lora, tmp_path):
    """Whatever way was asked for before."""
    flags = ["--tokens", saved / "tokens"] * (tokens == "both") + ["--lora", saved / "lora"] * lora
    generate.main(["--model", str(flow_base), "--output_dir", str(tmp_path), "--prompts",
                   "world:validation:1", "--num_inference_steps", "2", "--batch_size", "1",
                   "--guidance_scale", "2", *map(str, flags)])  # fmt: skip
    prompt = json.loads((tmp_path / "00000" / "metadata.jsonl").read_text())["prompt"]
    way = Way(2.0, Sampling(tokens), lora)
    image = comparison.image(prompt, way, num_inference_steps=2)
    assert np.array_equal(image, pixels(tmp_path / "00000" / "samples" / "0000.png"))
    others = [Way(2.0, Sampling(tokens), not lora), Way(1.0, Sampling(tokens), lora)]
    for other in [*others, Way(2.0, Sampling("off" if tokens == "both" else "both"), lora)]:
        assert not np.array_equal(image, comparison.image(prompt, other, num_inference_steps=2))
    assert not np.array_equal(image, comparison.image(prompt, way, num_inference_steps=2, seed=1))


def test_the_choices_are_those_of_the_pipeline(comparison, flow_base, monkeypatch):
    assert comparison.policies == list(Sampling) and comparison.has_lora
    bare = Comparison(_loaded(flow_base), tokens="", lora="")
    assert bare.policies == [] and not bare.has_lora
    assert bare.image("a red circle", Way(1.0), num_inference_steps=1).shape == (24, 24, 3)
    # A pipeline that calls its denoiser for each branch.
    monkeypatch.delattr(type(comparison.model.pipe), "do_classifier_free_guidance")
    attached = comparison.attached
    fresh = Comparison.__new__(Comparison)
    fresh.model, fresh.attached = comparison.model, attached
    assert [one for one in Sampling if fresh._takes(one)] == [Sampling.BOTH, Sampling.OFF]


def test_without_gradio_the_error_says_what_to_install(monkeypatch, flow_base):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"expected gradio.*\[app\]"):
        compare.main(["--model", str(flow_base)])


def test_the_page_samples_both_sides(flow_base, saved):
    """In a process of its own: gradio leaves sockets open."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[app]'")
    script = f"""
import sys, numpy as np, torch
sys.path.insert(0, "recipes")
import compare
from common.comparison import Comparison
from common.pipeline import TextToImage
from world.architectures import pipeline_arguments
model = TextToImage.load({str(flow_base)!r}, torch.float32, "cpu", pipeline_arguments)
page = compare.page(Comparison(model, tokens={str(saved / "tokens")!r}, lora=""))
both = next(iter(page.fns.values())).fn
left, right = both("a red circle", 0, 2, 2.0, "off", False, 2.0, "both", True)
assert left.shape == right.shape == (384, 384, 3) and not np.array_equal(left, right)
same, again = both("a red circle", 0, 2, 2.0, "off", False, 2.0, "off", False)
assert np.array_equal(same, again) and np.array_equal(same, left)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
