"""Readers of other columns than a prompt with its answers: Alpaca's, DeepSpeed-Chat's sets."""

import re
from collections.abc import Mapping

from dschat.data.columns import Row, pick, pick_number, pick_text
from dschat.errors import UserError
from dschat.text.conversations import ASSISTANT, Example, Skip, Turn, kind_of, merge, question

SCORE_KEYS = ("fine-grained_score", "overall_score", "score")
_CITATION = re.compile(r" ?\[\d+(?:, ?\d+)*\]")
_VICUNA_SPEAKER = re.compile(r"(?:\A|\s|</s>)(USER|ASSISTANT):")


def read_alpaca(row: Row) -> Example:
    """Columns instruction, output and maybe input, which follows the instruction."""
    question_text = pick_text(row, "instruction")
    more = row.get("input")
    if more is not None and not isinstance(more, str):
        raise UserError(f"column 'input' is {kind_of(more)}, needs text; fix the row")
    prompt = f"{question_text}\n\n{more}" if more else question_text
    return Example(question(prompt), pick_text(row, "output"))


def read_question(row: Row) -> Example:
    """Columns question and answer, as GSM8K's; an answer may be a number, which is its text."""
    answer = row["answer"]
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    return Example(question(pick_text(row, "question")), str(answer) if is_number else answer)


def read_synthetic_instruct(row: Row) -> Example:
    """Dahoas/synthetic-instruct-gptj-pairwise: prompts are bare questions."""
    return Example(question(pick_text(row, "prompt")), row.get("chosen"), row.get("rejected"))


def read_rlhf_reward(row: Row) -> Example:
    """yitingxie/rlhf-reward-datasets: `Assistant:` stands before the answers, not in the prompt."""
    prompt = pick_text(row, "prompt").rstrip().removesuffix(ASSISTANT)
    chosen, rejected = (
        pick_text(row, column).lstrip().removeprefix(ASSISTANT.strip())
        for column in ("chosen", "rejected")
    )
    return Example(prompt + ASSISTANT, chosen, rejected)


def read_webgpt(row: Row) -> Example:
    """openai/webgpt_comparisons: two scored answers, freed of their marks of citation, [1]."""
    scores = [pick_number(row, f"score_{side}") for side in (0, 1)]
    if scores[0] == scores[1]:
        raise Skip("tie")
    best = int(scores[1] > scores[0])
    answers = [_CITATION.sub("", pick_text(row, f"answer_{side}")) for side in (0, 1)]
    return Example(question(pick_text(row, "question.full_text")), answers[best], answers[1 - best])


def read_shp(row: Row) -> Example:
    """stanfordnlp/SHP: labels is 1 where A was preferred, else 0."""
    label = pick_number(row, "labels")
    if label not in (0, 1):
        raise UserError(f"column 'labels' is {row['labels']!r}, needs 0 or 1; fix the row")
    chosen, rejected = (
        pick_text(row, f"human_ref_{side}") for side in ("BA" if label == 0 else "AB")
    )
    return Example(question(pick_text(row, "history")), chosen, rejected)


def is_vicuna(row: Row) -> bool:
    """Tell this set's prompt and label from the many columns of such names."""
    prompt, label = row.get("prompt"), row.get("label")
    return (
        isinstance(prompt, str)
        and isinstance(label, str)
        and _VICUNA_SPEAKER.search(prompt) is not None
    )


def read_vicuna(row: Row) -> Example:
    """pvduy/sharegpt_alpaca_oa_vicuna_format: a text of USER: and ASSISTANT:, and a label."""
    text = pick_text(row, "prompt")
    marks = list(_VICUNA_SPEAKER.finditer(text))
    if not marks:
        raise UserError("column 'prompt' has no 'USER:'; fix or drop the row")
    turns = [Turn("system", text[: marks[0].start()].strip())]
    for mark, end in zip(marks, [*(m.start() for m in marks[1:]), len(text)], strict=True):
        role = "user" if mark[1] == "USER" else "assistant"
        turns.append(Turn(role, text[mark.end() : end].strip().removesuffix("</s>").strip()))
    prompt = merge(turns)
    if prompt[-1].role != "user":
        raise Skip("prompt does not end with a question")
    answer = pick_text(row, "label").strip().removesuffix("</s>").strip()
    return Example(prompt, answer)


def read_zhihu(row: Row) -> Example:
    """wangrui6/Zhihu-KOL: INSTRUCTION and RESPONSE."""
    return Example(question(pick_text(row, "INSTRUCTION")), pick_text(row, "RESPONSE"))


def read_miracl(row: Row) -> Example:
    """Cohere/miracl-*-queries-22-12: first positive passage against the first negative one."""
    chosen, rejected = (
        pick_text(row, f"{kind}_passages.0.text") for kind in ("positive", "negative")
    )
    return Example(question(pick_text(row, "query")), chosen, rejected)


def read_hc3(row: Row) -> Example:
    """Hello-SimpleAI/HC3-Chinese: the first human answer."""
    return Example(question(pick_text(row, "question")), pick_text(row, "human_answers.0"))


def read_jaquad(row: Row) -> Example:
    """lmqg/qg_jaquad: a question and the sentence that answers it."""
    return Example(question(pick_text(row, "question")), pick_text(row, "sentence"))


def read_jaquad_paragraph(row: Row) -> Example:
    """lmqg/qag_jaquad: the first question on a paragraph, and the paragraph."""
    return Example(question(pick_text(row, "questions.0")), pick_text(row, "paragraph"))


def read_mkqa_chinese(row: Row) -> Example:
    """mkqa-Chinese: the part of MKQA that is in simplified Chinese."""
    return _mkqa(row, "zh_cn")


def read_mkqa_japanese(row: Row) -> Example:
    """mkqa-Japanese: the part of MKQA that is in Japanese."""
    return _mkqa(row, "ja")


def _mkqa(row: Row, language: str) -> Example:
    if pick(row, f"answers.{language}.0.text") is None:
        raise Skip("question without a short answer")
    answer = pick_text(row, f"answers.{language}.0.text")
    return Example(question(pick_text(row, f"queries.{language}")), answer)


def refuse_mkqa(row: Row) -> Example:
    """MKQA under another name: its columns do not say which of its languages is meant."""
    raise UserError(
        "a row of MKQA, which holds many languages; name its folder mkqa-Chinese or mkqa-Japanese, "
        "or map columns, as in --dataset_columns prompt=queries.en chosen=answers.en.0.text"
    )


def read_completions(row: Row) -> Example:
    """Column completions, scored answers to instruction (or prompt): the best and the worst."""
    prompt = pick_text(row, "instruction" if "instruction" in row else "prompt")
    answers = row.get("completions")
    if not isinstance(answers, list | tuple) or not all(isinstance(a, Mapping) for a in answers):
        raise UserError("column 'completions' needs a list of objects; fix or drop the row")
    scored = []
    for answer in answers:
        key = next((key for key in SCORE_KEYS if answer.get(key) is not None), None)
        if key is not None:
            scored.append((pick_number(answer, key), pick_text(answer, "response")))
    if len(scored) < 2:
        raise Skip("fewer than two scored completions")
    worst, best = (bound(scored, key=lambda pair: pair[0]) for bound in (min, max))
    if worst[0] == best[0]:
        raise Skip("tie")
    return Example(question(prompt), best[1], worst[1])
