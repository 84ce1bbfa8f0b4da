"""What candidates answer to held-out prompts: greedily, so that everybody's answer is the same every time."""

from collections.abc import Sequence

import torch

from utils.evaluation.encoding import chat_texts
from utils.evaluation.tasks import TEST, Row, Task
from utils.evaluation.whole_models import WholeModel

MOST_PROMPTS = 8
NEW_TOKENS = 128


def prompts_of(tasks: Sequence[Task], most: int = MOST_PROMPTS) -> list[tuple[str, Row]]:
    """Test rows that have a prompt and an answer, taken from the tasks in turn: task name and row."""
    waiting = [[(task.name, task.rows[number]) for number in task.part(TEST)] for task in tasks]
    waiting = [[one for one in rows if one[1].prompt or one[1].messages] for rows in waiting]
    chosen = [rows[place] for place in range(most) for rows in waiting if place < len(rows)]
    return chosen[:most]


def expected(row: Row) -> str:
    """What the row itself answers."""
    return row.answer if row.messages is None else str(row.messages[-1].get("content", ""))


def shown(row: Row) -> str:
    """The prompt as a person reads it."""
    if row.messages is None:
        return row.prompt
    return "\n".join(f"{one['role']}: {one.get('content', '')}" for one in row.messages[:-1])


@torch.inference_mode()
def greedy_answers(whole: WholeModel, rows: Sequence[Row], most: int = NEW_TOKENS) -> list[str]:
    """The model's greedy answer to each row's prompt, at most `most` tokens, special tokens left out.

    Prompts that leave no room for them in the model's positions are cut at their beginning.
    """
    model, tokenizer = whole.model, whole.tokenizer
    device = next(model.parameters()).device
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = []
    for row in rows:
        if row.messages is None:
            ids = tokenizer(row.prompt)["input_ids"]
        else:
            text, _ = chat_texts(row.messages, tokenizer, f"row {row.place}")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        new = most if positions is None else min(most, max(1, positions // 2))
        ids = ids if positions is None else ids[-max(1, positions - new) :]
        batch = torch.tensor([ids], device=device)
        whole_text = model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
        )
        answers.append(tokenizer.decode(whole_text[0, len(ids) :], skip_special_tokens=True))
    return answers
