"""A page in the browser: one prompt on one noise, sampled in two ways side by side.

    python recipes/compare.py --model recipes/models/flow_clean --lora runs/lora/lora
    python recipes/compare.py --model <folder or hub id> --tokens <folder or hub id>

Each side has its own CFG, and its own choice of tokens and LoRA. Gradio serves the page on this
machine; its variables GRADIO_SERVER_PORT, GRADIO_SERVER_NAME and GRADIO_SHARE say where else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from common.options import Checked, option, parse
from common.stop import command

if TYPE_CHECKING:
    from common.comparison import Comparison


@dataclass(frozen=True)
class Options(Checked):
    """Every option, its default and its meaning."""

    model: str = option("", "Pipeline to sample: a folder or a hub id.")
    tokens: str = option("", "Soft tokens to attach: a folder or a hub id.")
    lora: str = option("", "LoRA to load: a folder or a hub id.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Type of the weights.")
    device: str | None = option(
        None, "Device to sample on; left out: the accelerator where there is one, else cpu."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("model: expected a pipeline, a folder or a hub id, got none.")


def main(arguments: list[str] | None = None) -> None:
    """Loads the pipeline and serves the page until it is stopped."""
    options = parse(Options, __doc__, arguments)
    _gradio()

    import torch

    from common.comparison import Comparison
    from common.pipeline import TextToImage, chosen_device
    from common.sources import check_source
    from world.architectures import pipeline_arguments

    for name in ("model", "tokens", "lora"):
        check_source(name, getattr(options, name))
    model = TextToImage.load(
        options.model,
        getattr(torch, options.dtype),
        chosen_device(options.device),
        pipeline_arguments,
    )
    page(Comparison(model, tokens=options.tokens, lora=options.lora)).launch()


def page(comparison: Comparison) -> Any:
    """The page, a `gradio.Blocks`: `launch()` serves it."""
    from agsm_loss.integrations.tokens.pipelines import Sampling
    from common.comparison import Way

    gr = _gradio()
    # Hidden, and without effect, where there are no tokens.
    policies = [one.value for one in comparison.policies or Sampling]

    def side(tokens: Sampling, lora: bool) -> tuple[list[Any], Any]:
        with gr.Column():
            inputs = [
                gr.Slider(0, 15, 1, step=0.25, label="CFG (guidance_scale); 1: none"),
                gr.Dropdown(
                    policies, value=tokens.value, label="tokens", visible=bool(comparison.policies)
                ),
                gr.Checkbox(lora, label="LoRA", visible=comparison.has_lora),
            ]
            return inputs, gr.Image(label="image", show_label=False, format="png")

    def both(prompt: str, seed: int, steps: int, *ways: Any) -> list[Any]:
        chosen = [Way(cfg, Sampling(tokens), lora) for cfg, tokens, lora in (ways[:3], ways[3:])]
        return [
            _shown(comparison.image(prompt, way, num_inference_steps=int(steps), seed=int(seed)))
            for way in chosen
        ]

    with gr.Blocks(title="agsm-loss") as blocks:
        with gr.Row():
            prompt = gr.Textbox("two red circles", label="prompt", scale=3)
            seed = gr.Number(0, label="seed", precision=0, minimum=0)
            steps = gr.Slider(1, 100, 20, step=1, label="sampling steps")
        button = gr.Button("Sample", variant="primary")
        with gr.Row():
            left, left_image = side(Sampling.OFF, False)
            right, right_image = side(Sampling.BOTH, True)
        given = [prompt, seed, steps, *left, *right]
        for event in (button.click, prompt.submit):
            event(both, given, [left_image, right_image], api_name=False)
    return blocks


def _shown(image: Any) -> Any:
    """At least 384 pixels a side, without smoothing: the embedded world's have 24."""
    times = -(-384 // image.shape[0])
    return image.repeat(times, 0).repeat(times, 1)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise ImportError(
            'expected gradio to be installed. In the clone, run: pip install ".[app]"'
        ) from None
    return gradio


if __name__ == "__main__":
    command(main)
