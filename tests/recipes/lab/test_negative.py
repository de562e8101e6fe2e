"""What negative tokens have learned."""

import pytest
import torch

from agsm_loss.integrations.denoisers import TokenDenoiser
from lab.studies.negative import learned, main
from model.pipeline import TextToImage


def test_a_wrong_caption_that_is_as_none_makes_the_move_guidance():
    torch.manual_seed(0)
    own, wrong, null = torch.randn(3, 4, 2, 8, 8)
    distance, (before, after) = learned(own, wrong, null, own, null)
    assert distance == 0 and after == pytest.approx(1) and before < 0.8
    assert learned(own, wrong, null, own, wrong).distance == pytest.approx(1)
    halfway = learned(own, wrong, null, own, (wrong + null) / 2)
    assert halfway.distance == pytest.approx(0.25) and before < halfway.cosines[1] < 1


def test_the_command_measures_saved_tokens(flow_base, tmp_path, capsys):
    denoiser = TokenDenoiser(TextToImage.load(str(flow_base), torch.float32).denoiser)
    denoiser.save_pretrained(tmp_path)
    main(["--model", str(flow_base), "--tokens", str(tmp_path), "--number", "4"])
    assert "of without" in capsys.readouterr().out
