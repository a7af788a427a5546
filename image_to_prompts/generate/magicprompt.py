"""The reference prompt source: MagicPrompt, a GPT-2 that writes Stable Diffusion prompts from an empty start.

A prompt depends on (seed, index) alone. Sampling from a softmax equals taking the largest logit after adding Gumbel
noise (Gumbel-max trick, Maddison et al. 2014), so each row gets noise from its own generator and the library decodes
greedily.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from .. import weights
from ..metadata import row_seed

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

MIN_LENGTH, MAX_LENGTH = 30, 100  # tokens, as the reference draws them
TOP_K = 50  # the default of the text-generation pipeline that the reference used


def load(path: Path | None = None) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer onto the best device.

    Raises:
        UserError: If the weights are nowhere to be found.
    """
    folder = weights.locate("magicprompt", path)
    import torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = PartialState().device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def clean(text: str) -> str:
    """The reference's clean-up: drops tokens with an inner dot, newlines and angle brackets, trims " .,"."""
    text = re.sub(r"[\n\r<>]", " ", text)
    words = [word for word in text.split() if not re.search(r"\w\.\w", word)]
    return " ".join(words).strip(" .,")


def _gumbel(generators: list[torch.Generator], temperature: float, device: torch.device) -> object:
    import torch
    from transformers import LogitsProcessor

    class GumbelNoise(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.float() / temperature
            kept = scores >= scores.topk(min(TOP_K, scores.shape[-1])).values[:, -1:]
            noise = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=g) for g in generators])
            return torch.where(kept, scores - noise.log().to(device), -torch.inf)

    return GumbelNoise()


def sample(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    indices: list[int],
    temperature: float = 1.0,
) -> list[str]:
    """Writes one prompt for each index.

    Args:
        model: From `load`.
        tokenizer: From `load`.
        seed: Seed of the whole set.
        indices: Which prompts of the set; a prompt depends on (seed, index), not on its neighbours here.
        temperature: Softmax temperature.

    Returns:
        Cleaned prompts, one an index; "" where nothing was left after cleaning.
    """
    import torch
    from transformers import LogitsProcessorList

    device = model.device
    generators = [torch.Generator().manual_seed(row_seed(f"magicprompt {seed} {index}")) for index in indices]
    lengths = [int(torch.randint(MIN_LENGTH, MAX_LENGTH + 1, (), generator=g)) for g in generators]
    end = tokenizer.eos_token_id
    start = torch.full((len(indices), 1), tokenizer.bos_token_id or end, device=device)
    with torch.inference_mode():
        tokens = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=False,
            max_length=max(lengths),
            pad_token_id=end,
            eos_token_id=end,
            logits_processor=LogitsProcessorList([_gumbel(generators, temperature, device)]),
        )
    rows = [row[1:length] for row, length in zip(tokens.cpu(), lengths, strict=True)]
    return [clean(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
