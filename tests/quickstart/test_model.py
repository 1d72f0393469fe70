"""The quickstart's model folder and files: exact tokens, seeded weights, no leak between splits."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dschat.quickstart import build, model, task, world


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return model.build_tokenizer(model.corpus())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quickstart") / "out"
    build(path, seed=1)
    return path


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_special_tokens_are_distinct_and_only_bos_is_added(tokenizer):
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len({*ids}) == 3
    encoded = tokenizer("A cow says moo.").input_ids
    assert encoded[0] == tokenizer.bos_token_id
    assert not {*ids} & {*encoded[1:]}


@pytest.mark.parametrize("text", ["", " moo", "\n\n\n x  y", "Žebra 42!?", "a\tb\r\n", "猫 🐄"])
def test_any_text_survives_the_round_trip(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_prompt_alone_is_a_prefix_of_prompt_and_answer(tokenizer):
    rng = random.Random(0)
    longest_prompt = longest_answer = 0
    assert len(tokenizer("\n\n", add_special_tokens=False).input_ids) == 1
    for prompt in world.fact_of_prompt():
        ids = tokenizer(prompt).input_ids
        for kind in task.KINDS:
            answer = task.answer_of_kind(rng, prompt, kind)
            rest = tokenizer(answer, add_special_tokens=False).input_ids
            assert tokenizer(prompt + answer).input_ids == ids + rest
            longest_answer = max(longest_answer, len(rest) + 1)  # with the end token
        longest_prompt = max(longest_prompt, len(ids))
    assert longest_prompt <= 24
    assert longest_answer <= model.MAX_NEW_TOKENS


def test_every_word_of_the_world_is_one_token(tokenizer):
    for text in model.corpus():
        for word in text.replace(".", " ").replace("!", " ").replace("?", " ").split():
            if word.isalpha():
                assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word


def test_chat_template_writes_the_format_of_the_data(tokenizer):
    prompt = "\n\nHuman: What does a cow say?\n\nAssistant:"
    turns = [{"role": "user", "content": "What does a cow say?"}]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert asked == tokenizer.bos_token + prompt
    turns.append({"role": "assistant", "content": "A cow says moo."})
    told = tokenizer.apply_chat_template(turns, tokenize=False)
    assert told == f"{tokenizer.bos_token}{prompt} A cow says moo.{tokenizer.eos_token}"


def test_weights_follow_the_seed_and_leave_the_callers_random_state(tokenizer):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, same, other = (model.build_model(tokenizer, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_folder_loads_and_its_special_ids_agree(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True)
    assert sum(p.numel() for p in loaded.parameters()) < 2_000_000
    assert loaded.get_input_embeddings().weight.shape[0] == len(tokenizer)
    for config in (loaded.config, loaded.generation_config):
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
    assert loaded.generation_config.do_sample
    assert tokenizer.chat_template is not None
    built = model.build_model(tokenizer, seed=1).state_dict()
    assert all(torch.equal(built[name], tensor) for name, tensor in loaded.state_dict().items())


def test_no_test_prompt_is_in_a_training_file(folder: Path):
    files = {
        f"{kind}/{split}": read(folder / kind / f"{split}.jsonl")
        for kind in ("sft", "data")
        for split in ("train", "test")
    }
    prompts = {name: {row["prompt"] for row in rows} for name, rows in files.items()}
    trained = prompts["sft/train"] | prompts["data/train"]
    tested = prompts["sft/test"] | prompts["data/test"]
    assert trained.isdisjoint(tested)
    assert len(tested) == len(list(world.all_facts()))
    assert set(files["sft/train"][0]) == {"prompt", "response"}
    assert set(files["data/train"][0]) == {"prompt", "chosen", "rejected"}
    # Label noise is for training: a held-out pair is never the wrong way round.
    assert not any(task.gold(row["prompt"], row["rejected"]) for row in files["data/test"])
    assert any(task.gold(row["prompt"], row["rejected"]) for row in files["data/train"])


def test_the_same_seed_writes_the_same_files(folder: Path, tmp_path: Path):
    build(tmp_path / "again", seed=1)
    build(tmp_path / "other", seed=2)
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    data = Path("data") / "train.jsonl"
    assert (tmp_path / "other" / data).read_bytes() != (folder / data).read_bytes()
