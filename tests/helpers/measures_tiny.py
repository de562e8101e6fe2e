"""Tiny random models of transformers that score pictures, saved in a folder with their processors.

Their words are spelt in letters, and the detector's classes are three of COCO's.
"""

import string

import torch

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip
SIDE = {"height": 32, "width": 32}


def words():
    """The end of a text has the largest number, as in CLIP: that is where OWLv2 looks for it."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *string.digits, *'.,-"']
    tokens = ["<pad>", "<|startoftext|>", *letters, *(letter + "</w>" for letter in letters),
              "<|endoftext|>"]  # fmt: skip
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token="<pad>", model_max_length=64)


def sizes(text):
    return {**SMALL, "vocab_size": len(text), "max_position_embeddings": 64,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": text.eos_token_id}  # fmt: skip


def clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    text = words()
    config = CLIPConfig(
        text_config=sizes(text),
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size=SIDE, crop_size=SIDE), text).save_pretrained(folder)
    return str(folder)


def mask2former(folder):
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1],
        window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=5, id2label={0: "sofa", 1: "dog", 2: "mouse"},
        label2id={"sofa": 0, "dog": 1, "mouse": 2},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, num_labels=3).save_pretrained(
        folder
    )
    return str(folder)


def owlv2(folder):
    from transformers import (
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
    )

    torch.manual_seed(0)
    text = words()
    config = Owlv2Config(
        text_config=sizes(text),
        vision_config={**SMALL, "image_size": 32, "patch_size": 8}, projection_dim=16,
    )  # fmt: skip
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size=SIDE), text).save_pretrained(folder)
    return str(folder)


def counted(pixels, prompts):
    """A reward of somebody's own: 1, 2, ..."""
    return torch.arange(1.0, len(prompts) + 1)
