"""One prompt and one noise, sampled in several ways by one pipeline.

comparison = Comparison(model, tokens="runs/agsm/tokens", lora="")
image = comparison.image("a red circle", Way(guidance_scale=3.0, tokens=Sampling.OFF))
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from agsm_loss.integrations.tokens.pipelines import Sampling, load_soft_tokens, set_sampling
from common.pipeline import TextToImage
from common.sampling import sample
from common.sources import loading


@dataclass(frozen=True)
class Way:
    """How an image is sampled: its CFG, which tokens each branch gets, and whether with the LoRA.

    tokens and lora change nothing where there are none.
    """

    guidance_scale: float
    tokens: Sampling = Sampling.BOTH
    lora: bool = True


class Comparison:
    """A pipeline with soft tokens and a LoRA that each image has or has not.

    Args:
        model: the pipeline.
        tokens, lora: a folder or a hub id each; "" for none.

    Attributes:
        policies: the choices of tokens that this pipeline can sample with; none without tokens.
        has_lora: whether there is a LoRA.
    """

    def __init__(self, model: TextToImage, *, tokens: str, lora: str) -> None:
        model.load_extras("", lora)
        self.model, self.has_lora, self.attached = model, bool(lora), None
        if tokens:
            with loading("tokens", tokens):
                self.attached = load_soft_tokens(model.pipe, tokens)
        self.policies = [one for one in Sampling if self._takes(one)]

    def _takes(self, sampling: Sampling) -> bool:
        if self.attached is None:
            return False
        try:
            set_sampling(self.model.pipe, self.attached, sampling)
        except ValueError:  # its branches are called one by one
            return False
        return True

    def image(
        self, prompt: str, way: Way, *, num_inference_steps: int = 20, seed: int = 0
    ) -> npt.NDArray[np.uint8]:
        """(H, W, 3); the noise is the same for all ways. It is that of `generate.py`'s image 0."""
        if self.attached is not None:
            set_sampling(self.model.pipe, self.attached, way.tokens)
        if self.has_lora:
            (self.model.pipe.enable_lora if way.lora else self.model.pipe.disable_lora)()
        return sample(
            self.model.pipe,
            [prompt],
            seeds=[(seed, 0, 0)],
            num_inference_steps=num_inference_steps,
            guidance_scale=way.guidance_scale,
            arguments=self.model.arguments,
        )[0]
