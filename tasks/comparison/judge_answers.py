"""Stage: a judge model compares two models' answers, through any server that speaks OpenAI's protocol. Off by default.

A judge prefers what stands first, or what is longer (arXiv 2306.05685): each pair is asked in both orders, and only a
preference that survives the swap counts. It is an opinion beside the metrics, and never decides a verdict.
"""

from __future__ import annotations

import json

from tqdm import tqdm

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.stage import stage
from tasks.evaluation.answering import read_answers
from tasks.evaluation.judge import Judge, no_letter


@stage(libraries=("openai",), retries=2)
def judge_answers(reference: Artifact, *, answers: Artifact, url: str, model: str, store: Store) -> Artifact:
    """Ask the judge which of two models' answers to the same prompts are better.

    Args:
        reference: the artifact `answers` of the one that is compared with.
        answers: that of the other, to the same prompts.
        url: base address of the server, such as http://127.0.0.1:11434/v1; its key, if it wants one, is OPENAI_API_KEY.
        model: the judge's name there.
        store: where the artifact goes.

    Returns:
        The artifact `judgement`: a line of JSON for each prompt with both replies and `outcome`: 1 where the other's
        answer is better, -1 where the reference's is, 0 otherwise. Its facts tell with what options was asked.

    Raises:
        UserError: the server refuses, or no reply was a letter.
        TemporaryError: the server does not answer.
    """
    lines, asked, unclear, judge = [], 0, 0, Judge(url, model)
    pairs = list(zip(read_answers(reference), read_answers(answers), strict=True))
    for reference_line, other_line in tqdm(pairs, desc=f"Judged by {model}", unit="answer"):
        first = second = "C"
        if reference_line["answer"] != other_line["answer"]:
            first = judge.ask(reference_line, a=other_line["answer"], b=reference_line["answer"])
            second = judge.ask(reference_line, a=reference_line["answer"], b=other_line["answer"])
            asked += 2
        unclear += (first, second).count("?")
        outcome = {("A", "B"): 1, ("B", "A"): -1}.get((first, second), 0)
        lines.append({"prompt": reference_line["prompt"], "replies": [first, second], "outcome": outcome})
    if unclear and unclear == asked:
        raise no_letter(model, unclear)
    with store.draft("judgement") as draft:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (draft.path / "judgement.jsonl").write_text(text, encoding="utf-8")
        swayed = sum(line["replies"] in (["A", "A"], ["B", "B"]) for line in lines)
        draft.facts = {
            "model": model,
            "answers": len(lines),
            "unclear": unclear,
            "swayed_by_order": swayed,
            "options": judge.options,
        }
    return draft.done()
