"""The reference prompt source: MagicPrompt, a GPT-2 that writes Stable Diffusion prompts from an empty start.

A prompt depends on (seed, index) alone. Each row has one uniform number a token, drawn by a generator of its own, and
takes the token at which the cumulative probability passes it (inverse transform sampling, Devroye 1986, ch. II.2);
transformers then decodes greedily. Weights stay in float32: in float16 the batch size would change logits enough to
change tokens.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..data.metadata import row_seed
from ..models import layouts, weights
from ..run.devices import process_state
from ..run.errors import UserError

MIN_LENGTH, MAX_LENGTH = 30, 100  # tokens with the start token, as the reference draws them


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: Divides the logits.
        top_k: Only the k likeliest tokens; 0 for all. 50 is the default of the transformers pipeline that the
            reference used.
        top_p: Only the likeliest tokens whose probabilities add up to this (nucleus sampling, Holtzman et al. 2020).
        starts: Phrases to start from, taken in turn; without any, prompts start from nothing.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    starts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError("--temperature must be above 0, --top-k at least 0 (off), --top-p above 0 and at most 1")


def load(path: Path | None = None) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer onto the best device.

    Raises:
        UserError: If the weights are nowhere to be found or cannot be read.
    """
    folder = weights.locate("magicprompt", path)
    with layouts.reading(folder, "a GPT-2 language model"):
        model = AutoModelForCausalLM.from_pretrained(folder, variant=layouts.variant(folder), **layouts.FROM_FOLDER)
        tokenizer = AutoTokenizer.from_pretrained(folder, **layouts.FROM_FOLDER)
    return model.float().to(process_state().device).eval(), tokenizer


def clean(text: str) -> str:
    """The reference's clean-up: drops tokens with an inner dot, newlines and angle brackets, trims " .,".

    Control characters go too, which it left in: pandas 2.2 cuts a field at NUL.
    """
    text = re.sub(r"[\x00-\x08\x0e-\x1f\x7f]", "", re.sub(r"[<>]", " ", text))
    words = [word for word in text.split() if not re.search(r"\w\.\w", word)]
    return " ".join(words).strip(" .,")


class InverseTransform(LogitsProcessor):
    """A last processor that leaves one token a row: the one at which the cumulative probability passes a number."""

    def __init__(self, uniforms: torch.Tensor) -> None:
        """Takes float32 (rows, tokens to write) in [0, 1)."""
        self.uniforms, self.step = uniforms, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = scores.float().softmax(-1).cumsum(-1)
        # Scaled, so that a uniform close to 1 cannot pass the last possible token by rounding.
        wanted = self.uniforms[:, self.step : self.step + 1] * cumulative[:, -1:] * (1 - 1e-6)
        self.step += 1
        chosen = torch.searchsorted(cumulative, wanted, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def sample(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    indices: list[int],
    sampling: Sampling | None = None,
) -> list[str]:
    """Writes one prompt for each index.

    Args:
        model: From `load`.
        tokenizer: From `load`.
        seed: Seed of the whole set.
        indices: Which prompts of the set; a prompt depends on (seed, index), not on its neighbours here.
        sampling: How to draw; left out: as the reference does.

    Returns:
        Cleaned prompts, one an index; "" where nothing was left after cleaning.
    """
    sampling = sampling or Sampling()
    generators = [torch.Generator().manual_seed(row_seed(f"magicprompt {seed} {index}")) for index in indices]
    # A length counts the start token, as the reference's does; a start phrase comes on top.
    written = [int(torch.randint(MIN_LENGTH, MAX_LENGTH + 1, (), generator=g)) - 1 for g in generators]
    uniforms = torch.stack([torch.rand(MAX_LENGTH, generator=g) for g in generators])
    processors = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(InverseTransform(uniforms.to(model.device)))

    end = tokenizer.eos_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    phrases = [sampling.starts[i % len(sampling.starts)] if sampling.starts else "" for i in indices]
    starts = [[begin, *tokenizer.encode(phrase, add_special_tokens=False)] for phrase in phrases]
    width = max(map(len, starts))
    padded = torch.tensor([[end] * (width - len(start)) + start for start in starts], device=model.device)
    mask = torch.tensor([[0] * (width - len(start)) + [1] * len(start) for start in starts], device=model.device)
    with torch.inference_mode():
        tokens = model.generate(
            padded,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(written),
            pad_token_id=end,
            eos_token_id=end,
            logits_processor=processors,
        )
    rows = [row[width - len(s) + 1 : width + n] for row, s, n in zip(tokens.cpu(), starts, written, strict=True)]
    return [clean(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
