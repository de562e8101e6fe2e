r"""What the negative tokens ψ⁻ have learned: is a wrong caption with them as the empty one?

    python -m recipes.lab.studies.negative --model runs/base_flow_sources/pipeline \
        --tokens runs/study_tokens/runs/AGSM/seed_0/train/tokens

If so, what AGSM moves the target along, p(y, ψ⁺) − p(ŷ, ψ⁻), is classifier-free guidance.
"""

from __future__ import annotations

import argparse
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from agsm_loss import Bank
from agsm_loss.integrations.denoisers import PlainDenoiser
from agsm_loss.integrations.tokens.saved import SavedTokens
from lab.studies.accuracy import noised
from lab.world.captions import caption
from lab.world.prompts import scenes
from model.pipeline import TextToImage


class Learned(NamedTuple):
    """Of a wrong caption: without tokens, then with ψ⁻.

    distance: squared distance with ψ⁻ to the prediction under no words, as a share of that without.
    cosines: of p(y) − p(ŷ) without tokens, and of p(y, ψ⁺) − p(ŷ, ψ⁻), with guidance, p(y) − p("").
    """

    distance: float
    cosines: tuple[float, float]


def learned(own: Tensor, wrong: Tensor, null: Tensor, own_on: Tensor, wrong_on: Tensor) -> Learned:
    """Of predictions (N, *D): without tokens, and of the captions with them (on)."""
    share = (wrong_on - null).square().sum() / (wrong - null).square().sum()
    moves = own - wrong, own_on - wrong_on
    angles = [cosine_similarity(one.flatten(), (own - null).flatten(), dim=0) for one in moves]
    return Learned(share.item(), (angles[0].item(), angles[1].item()))


@torch.no_grad()
def measure(model: TextToImage, tokens: SavedTokens, number: int, seed: int) -> Learned:
    """Over `number` held-out scenes of the world; a scene's wrong caption is the next one's."""
    generator = torch.Generator().manual_seed(seed)
    attached, denoiser = tokens.attach(model.denoiser), PlainDenoiser(model.denoiser)
    drawn = list(islice(scenes(seed, "heldout"), number))
    _, noisy, timesteps = noised(model, [scene for _, scene in drawn], generator)
    right = [caption(spec) for spec, _ in drawn]
    wrong = right[1:] + right[:1]

    def predict(texts: list[str], bank: Bank) -> Tensor:
        with attached.using(bank):
            pred: Tensor = denoiser(noisy, timesteps, model.encode_prompts(texts), bank)
        return pred

    off = [predict(texts, Bank.OFF) for texts in (right, wrong, [""] * number)]
    return learned(*off, predict(right, Bank.POSITIVE), predict(wrong, Bank.NEGATIVE))


def main(arguments: list[str] | None = None) -> None:
    """Prints what `measure` finds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the pipeline that they were trained on")
    parser.add_argument("--tokens", required=True, help="folder of soft tokens with two banks")
    parser.add_argument("--number", type=int, default=256, help="of images")
    parser.add_argument("--seed", type=int, default=0, help="of images and noise")
    options = parser.parse_args(arguments)
    model = TextToImage.load(options.model, torch.float32)
    tokens = SavedTokens.from_pretrained(options.tokens)
    distance, (before, after) = measure(model, tokens, options.number, options.seed)
    print(f"A wrong caption's squared distance to no words, with ψ⁻: {distance:.2f} of without")
    print(f"Cosine with guidance: {before:.2f} without tokens, {after:.2f} with both banks")


if __name__ == "__main__":
    main()
