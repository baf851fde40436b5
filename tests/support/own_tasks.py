"""Two lm-eval tasks of one's own, on the rows of a data set."""

from __future__ import annotations

GENERATION_TASK = """\
task: city
dataset_path: json
dataset_kwargs: {data_files: {test: "${dataset}/test.jsonl"}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.5}
"""
CHOICE_TASK = """\
task: city_choice
dataset_path: json
dataset_kwargs: {data_files: {test: "${dataset}/test.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: ["Paris", "Oslo"]
doc_to_target: !function choices.right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 2}
"""
CHOICES = "def right(doc):\n    return int('Oslo' in doc['completion'])\n"
