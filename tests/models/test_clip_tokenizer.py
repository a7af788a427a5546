"""CLIP's tokenizer is open_clip's, token for token."""

import open_clip

from image_to_prompts.models import clip_tokenizer


def test_clips_tokenizer_is_rebuilt_from_open_clip():
    ours, theirs = clip_tokenizer.load(), open_clip.get_tokenizer("ViT-H-14")
    assert len(ours) == 49408
    for text in ("a cat, oil painting, 8k", "Ünïcode café 日本, don't", "<b> of an ultrasaurus " * 20, ""):
        expected = theirs([text])[0].tolist()
        assert ours(text, padding="max_length", truncation=True).input_ids == expected
