"""Compare answers of a model before and after fine-tuning, side by side.

Prints, for each prompt, greedy and sampled answers of both models, and with `--num_beams` above 1
the best beam.

    python prompt_eval.py --model_name_or_path_baseline facebook/opt-1.3b \\
        --model_name_or_path_finetune ./output
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from dschat.config.cli import check_flags
    from dschat.config.programs import PromptEvaluation

    check_flags(PromptEvaluation, __doc__)

from typing import Protocol, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dschat.config.cli import parse, run_cli
from dschat.config.programs import QUESTIONS, PromptEvaluation
from dschat.config.unused import tell_unused
from dschat.models.causal_lm import check_context, create_hf_model
from dschat.models.config import check_kind
from dschat.rlhf.generation import own_generation_config
from dschat.text.conversations import Turn
from dschat.text.encoding import encode
from dschat.text.formats import choose_format, set_format
from dschat.text.ordinary import as_ordinary
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train.engine import resolve_dtype, torch_dtype
from dschat.utils.distributed import set_random_seed
from dschat.utils.printable import printable


def generation_configs(
    settings: PromptEvaluation, tokenizer: PreTrainedTokenizerBase
) -> dict[str, GenerationConfig]:
    """Configure each kind of answer."""
    common = {
        "max_new_tokens": settings.max_new_tokens,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    kinds = {"greedy": GenerationConfig(do_sample=False, **common)}
    kinds["sampled"] = GenerationConfig(
        do_sample=True,
        top_k=settings.top_k,
        num_return_sequences=settings.num_return_sequences,
        **common,
    )
    if settings.num_beams > 1:
        kinds["beam"] = GenerationConfig(num_beams=settings.num_beams, do_sample=False, **common)
    return kinds


class LanguageModel(Protocol):
    """A model of transformers that generates."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""

    def generate(
        self,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation_config: GenerationConfig,
    ) -> torch.Tensor:
        """Continue prompts: (B, P) ids -> (B, P + A) ids."""


@torch.no_grad()
def answers(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    config: GenerationConfig,
) -> list[str]:
    """Sample answers to the token ids of one prompt; decode them without special tokens."""
    input_ids = torch.tensor([prompt], device=model.device)
    with own_generation_config(cast(PreTrainedModel, model), config):
        ids = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config
        )
    return tokenizer.batch_decode(ids[:, len(prompt) :], skip_special_tokens=True)


def encoded(tokenizer: PreTrainedTokenizerBase, question: str, raw: bool) -> list[int]:
    """Encode a question as its tokenizer's format asks it, or as it stands."""
    form = choose_format(tokenizer)
    text = question if raw else form.prompt((Turn("user", as_ordinary(tokenizer, question)),))
    return encode(tokenizer, [text], raw or form.adds_special)[0]


def main() -> None:
    """Load both models and print their answers."""
    settings = parse(PromptEvaluation, None, __doc__)
    tell_unused(settings)
    dtype = torch_dtype(resolve_dtype(settings.dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = {
        "baseline": settings.model_name_or_path_baseline,
        "finetune": settings.model_name_or_path_finetune,
    }
    # Both tokenizers first: a wrong path of the second model should not wait for the first.
    for path in paths.values():
        check_kind(path)
    tokenizers = {
        label: load_hf_tokenizer(path, add_eot_token=settings.add_eot_token)
        for label, path in paths.items()
    }
    # Each model gets the format that it was trained with
    formats = {
        label: set_format(tokenizer, end_is_given=settings.add_eot_token)
        for label, tokenizer in tokenizers.items()
    }
    questions = settings.prompts or QUESTIONS[settings.language]
    for label, path in paths.items():
        longest = max(len(encoded(tokenizers[label], q, settings.raw)) for q in questions)
        check_context(path, longest + settings.max_new_tokens, "prompts and max_new_tokens")
    models: dict[str, tuple[LanguageModel, PreTrainedTokenizerBase]] = {}
    for label, path in paths.items():
        module: nn.Module = create_hf_model(path, tokenizers[label], dtype)
        models[label] = cast(LanguageModel, module.to(device).eval()), tokenizers[label]
    for question in questions:
        shown = question if settings.raw else formats["finetune"].prompt((Turn("user", question),))
        print(printable(f"\n== {shown.strip()}"))
        for label, (model, tokenizer) in models.items():
            prompt = encoded(tokenizer, question, settings.raw)
            for kind, config in generation_configs(settings, tokenizer).items():
                set_random_seed(settings.seed)
                for answer in answers(model, tokenizer, prompt, config):
                    print(printable(f"{label:>9}, {kind}: {answer.strip()}"), flush=True)


if __name__ == "__main__":
    run_cli(main)
