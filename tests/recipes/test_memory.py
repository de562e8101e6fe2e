"""The memory advice: its rule against runs on real tensors, counts against published ones."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from pipelines_tiny import speaking_pipeline

import memory
from agsm_loss import EMA
from model import live_memory
from model.live_memory import AsOnCuda, passes
from model.pipeline import TextToImage

# Of the models' cards and papers; SD3's table of positions is a buffer.
DENOISERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684, "sd3": 2_028_328_000,
             "flux": 11_901_408_320}  # fmt: skip
ENCODERS = {"text_encoder": 123_650_304, "text_encoder_2": 694_659_840,
            "text_encoder_3": 4_762_310_656, "vae": 83_819_683}  # fmt: skip
GB = 2**30


@pytest.mark.parametrize("name", DENOISERS)
def test_the_shipped_configs_have_the_published_parameters(name):
    about = memory.configs(name)
    model = memory.make(*about.get("unet", about.get("transformer")))
    assert sum(p.numel() for p in model.parameters()) == DENOISERS[name]
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_encoders_have_the_published_parameters():
    about = memory.configs("sd3")
    for name, number in ENCODERS.items():
        assert sum(p.numel() for p in memory.make(*about[name]).parameters()) == number


@pytest.fixture(scope="module", params=["unet_sdxl", "sd3", "flux"])
def folder(request, tmp_path_factory):
    return speaking_pipeline(request.param, tmp_path_factory.mktemp(request.param) / "p")


def options(folder, *flags):
    """Flux's own resolution is not in its config, and 128 latents a side are slow."""
    small = ["--resolution", "32"] if "flux" in folder.parent.name else []
    flags = ["--model", str(folder), "--mixed_precision", "no", *small, *flags]
    return memory.OPTIONS.parse(None, flags)


def made(chosen):
    """The trained module without data, and its inputs of 3 samples."""
    about = memory.configs(chosen.model)
    kind = about.pop("_class_name")
    network = memory.make(*about.get("unet", about.get("transformer")))
    inputs = memory.inputs_of(chosen, kind, network, memory.make(*about["vae"]))
    return memory.trained_module(chosen, network, torch.float32), inputs(3)


def real(chosen, inputs):
    """The same with numbers."""
    network = TextToImage.load(chosen.model, torch.float32).denoiser
    noisy, timesteps, *tables = inputs
    tables = ({name: torch.rand(value.shape) for name, value in one.items()} for one in tables)
    drawn = torch.rand(noisy.shape), torch.rand(timesteps.shape), *tables
    return memory.trained_module(chosen, network, torch.float32), drawn


class Saved:
    """The storages that autograd keeps, without weights."""

    def __init__(self, known):
        self.known = {one.untyped_storage().data_ptr() for one in known}
        self.storages = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage  # held, so that no other gets its place
        return tensor


@pytest.mark.parametrize(
    ("folder", "train"),
    [
        *(("unet_sdxl", train) for train in ("tokens", "lora", "full")),
        ("sd3", "tokens"),
        ("flux", "lora"),
    ],
    indirect=["folder"],
)
def test_the_rule_agrees_with_a_run_on_real_tensors(folder, train, monkeypatch):
    """With the CPU's own kernels in place of the rule for attention."""
    chosen = options(folder, "--train", train, "--num_tokens", "2", "--rank", "2")
    module, inputs = made(chosen)
    plain = passes(module, inputs, None, True)
    ranking = passes(module, inputs, None, False)
    module.model.enable_gradient_checkpointing(live_memory.checkpointing(None))
    checkpointed = passes(module, inputs, None, True)

    module, inputs = real(chosen, inputs)
    monkeypatch.setattr(live_memory, "AsOnCuda", lambda dtype: nullcontext())
    measured = passes(module, inputs, None, True)
    assert measured == pytest.approx(plain, rel=0.08)
    saved = Saved([*module.parameters(), *module.buffers()])
    noisy, timesteps, text, image = inputs
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        module(noisy, timesteps, text, torch.zeros(3, dtype=torch.long), **image)
    kept = sum(one.nbytes() for one in saved.storages.values())
    assert kept <= measured < 1.5 * kept
    assert passes(module, inputs, None, False) == pytest.approx(ranking, rel=0.1)
    module.model.enable_gradient_checkpointing()
    assert passes(module, inputs, None, True) == pytest.approx(checkpointed, rel=0.08)
    assert ranking < checkpointed < plain


def test_what_stays_is_what_a_run_holds(folder):
    chosen = options(folder, "--train", "lora", "--rank", "2")
    module, inputs = made(chosen)
    parts = memory.parts_of(chosen, module, {"vae": torch.nn.Linear(2, 3)}, torch.float32)
    module, (noisy, timesteps, text, image) = real(chosen, inputs)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer, ema = torch.optim.AdamW(trained), EMA(trained)
    module(noisy, timesteps, text, 0, **image).sum().backward()
    for parameter in trained:  # the last text block's are not reached
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()
    state = [v for one in optimizer.state.values() for v in one.values() if v.ndim]
    shadow = torch.utils._pytree.tree_leaves(ema.state_dict())

    def size(values):
        return sum(
            value.nbytes for value in values if isinstance(value, torch.Tensor) and value.ndim
        )

    assert parts == {
        "denoiser": size([*module.parameters(), *module.buffers()]),
        "gradients": size(p.grad for p in trained),
        "AdamW": size(state),
        "EMA": size(shadow),
        "text encoders": 0,
        "VAE (float32)": 9 * 4,
    }


def test_sharding_divides_and_a_reference_adds(folder):
    def parts(*flags):
        chosen = options(folder, "--train", "full", *flags)
        vae = {"vae": torch.nn.Linear(1, 1)}
        return memory.parts_of(chosen, made(chosen)[0], vae, torch.float32)

    one, four = parts("--reference"), parts("--reference", "--fsdp", "--num_processes", "4")
    for name in ("denoiser", "gradients", "AdamW", "EMA", "reference"):
        assert four[name] == one[name] / 4 > 0
    assert 0 < four["two gathered blocks"] < 2 * one["denoiser"]
    assert parts("--num_processes", "2")["DDP's buckets"] == one["gradients"]
    assert "VAE (float32)" not in parts("--precompute")


def test_autocast_casts_as_on_cuda():
    linear = torch.nn.Linear(3, 3, device="meta")
    with AsOnCuda(torch.bfloat16) as mode:
        out = linear(linear(torch.empty(2, 3, device="meta")))
        assert out.dtype == torch.bfloat16 and len(mode._casts) == 2  # weight and bias, once
        assert F.layer_norm(out, (3,)).dtype == torch.float32
        heads = torch.empty(2, 4, 50, 8, device="meta", requires_grad=True)
        attended = F.scaled_dot_product_attention(heads, heads, value=heads)
        assert attended.dtype == torch.bfloat16 and attended.shape == heads.shape


def test_the_largest_numbers_that_fit():
    line, half = memory.Line(GB, GB), memory.Line(GB, GB / 2)
    needs = memory.Needs({"denoiser": 2 * GB}, memory.Line(0, GB / 10), line, half, True)
    assert needs.total(2, 3) == (9 * GB, 6 * GB)
    chosen = memory.OPTIONS.parse(None, ["--train_batch_size", "2", "--num_negatives", "2"])
    rows = [one.split() for one in memory.table(chosen, needs) if one.startswith("  16 GB")]
    # 14.4 GB hold 11.4 samples, or 22.8: K 5 or 11 of 2 images, 3 or 7 images with K 3.
    assert [row[2:] for row in rows] == [["5", "11"], ["3", "7"]]
    matching = memory.Needs(needs.parts, needs.ranking, line, half, False)
    assert matching.total(2, 3) == (5 * GB, 4 * GB)
    assert matching.total(2, 100) == (22 * GB, 22 * GB)  # ranking holds the most


def test_the_command_prints_the_table(folder, capsys):
    memory.main(["--model", str(folder), "--mixed_precision", "no"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("in all")]
    assert sum(line.startswith("  ") for line in lines) == 2 * len(memory.CARDS)
