"""Generation in bf16: greedy answers against one scoring pass over them."""

import torch

from dschat.models.causal_lm import forward_inputs
from dschat.rlhf.part_config import SamplingConfig
from dschat.rlhf.rollout_engine import ROUNDINGS, TransformersRollout
from tests.helpers.tiny import byte_tokenizer, tiny_llama
from tests.rlhf.tiny_roles import prompts

LENGTH = 12


def test_greedy_answers_are_the_argmax_of_a_scoring_pass(device):
    model = tiny_llama().to(device, torch.bfloat16)
    batch = prompts(6).to(device)  # padded on the left
    engine = TransformersRollout(model, byte_tokenizer())
    sampling = SamplingConfig(max_answer_seq_len=LENGTH, min_answer_seq_len=LENGTH, greedy=True)
    sequences = engine.generate(batch, sampling).sequences
    assert sequences.shape == (6, batch.input_ids.shape[1] + LENGTH)
    assert sequences.device.type == device.type

    answers = sequences[:, -LENGTH:]
    mask = torch.cat([batch.attention_mask, torch.ones_like(answers, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        logits = model(**forward_inputs(model, sequences, mask), use_cache=False).logits.float()
    logits = logits[:, -LENGTH - 1 : -1]
    logits[..., byte_tokenizer().eos_token_id] = -torch.inf  # as min_new_tokens has it
    best, chosen = logits.max(-1).values, logits.gather(-1, answers[..., None]).squeeze(-1)
    # One token at a time and all at once are rounded otherwise: ties may go either way.
    tie = ROUNDINGS * torch.finfo(torch.bfloat16).eps * best.abs().max()
    assert (best - chosen <= tie).all()
    assert (answers == logits.argmax(-1)).float().mean() > 0.5
