"""Benchmarks of lm-evaluation-harness: on a task and a model of our own where it is installed, else a clear error."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import evaluate_tasks
from recipes.evaluate_tasks import HarnessMissing, run_tasks
from tests.support.tiny_llama import save_tiny_llama

TASK = """
task: next_word
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""
QUESTIONS = [
    {"question": f"w{n} w{n + 1} w{n + 2}", "choices": [f"w{n + 3}", f"w{(7 * n) % 50 + 4}"], "label": n % 2}
    for n in range(20)
]


def test_no_tasks_need_no_harness(monkeypatch):
    monkeypatch.setattr(evaluate_tasks, "find_spec", lambda name: None)
    assert run_tasks(None, None, tasks=[]) == {}


def test_tasks_without_the_harness_are_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(evaluate_tasks, "find_spec", lambda name: None)
    with pytest.raises(HarnessMissing, match=r"arc_easy.*pip install \"attnzoo\[eval\]\""):
        run_tasks(None, None, tasks=["arc_easy"])


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_a_local_task_gives_what_the_model_holds_likely(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = save_tiny_llama(tmp_path / "model")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "next_word.yaml").write_text(TASK.format(data=data))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = run_tasks(model, tokenizer, tasks=["next_word"], task_path=str(tmp_path / "tasks"), batch_size=4)
    right = 0
    for question in QUESTIONS:
        ids = tokenizer(question["question"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            words = F.log_softmax(model(ids).logits[0, -1], -1)
        scores = [words[tokenizer.convert_tokens_to_ids(choice)].item() for choice in question["choices"]]
        right += scores.index(max(scores)) == question["label"]
    assert found == {"next_word": {"acc": pytest.approx(right / len(QUESTIONS))}}
    assert 0 < right < len(QUESTIONS)
    with pytest.raises(ValueError, match="no task other"):
        run_tasks(model, tokenizer, tasks=["other"], task_path=str(tmp_path / "tasks"))
