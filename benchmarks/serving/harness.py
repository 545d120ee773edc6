"""lm-evaluation-harness against `edgeq serve`, on local questions, beside `edgeq eval`.

    pip install 'lm-eval[api]'
    python benchmarks/serving/harness.py [MODEL] [QUESTIONS] [--tokenizer FOLDER]

MODEL is what edgeq serves (the demo model), QUESTIONS a file of JSON lines in HellaSwag's form
(some that are included). FOLDER has the tokenizer, as Transformers reads it; it is MODEL if MODEL
is a folder with one. Both programs ask the same questions with
the same prompts: the harness through `/v1/completions` with `echo` and `logprobs`, from four
connections, and `edgeq eval` in this process. Nothing is fetched.

acc and acc_norm of both are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import edgeq

DEMO = Path(edgeq.__file__).parent / "demo_model"
STORIES = (
    ("Once upon a time, there was a little", ("girl", "dog", "stone", "the"), 0),
    ("Tom was very", ("happy", "under", "sad", "lamp"), 2),
    ("The cat sat on the", ("sky", "mat", "ran", "bed"), 1),
    ("Lily saw a big", ("box", "very", "and", "tree in the garden"), 3),
    ("The bird can", ("fly", "swim far", "book", "read"), 0),
    ("Mom gave him a", ("hug", "walked", "blue", "cake"), 0),
    ("They played in the", ("park", "sang", "water", "yesterday"), 2),
    ("He was not scared any", ("more", "dog", "time", "house"), 0),
)
TASK = """task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{activity_label}}}}: {{{{ctx_a}}}} {{{{ctx_b.capitalize()}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label | int}}}}"
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""


def main() -> None:
    """Ask both, and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(DEMO))
    parser.add_argument("questions", nargs="?")
    parser.add_argument("--tokenizer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = Path(args.questions) if args.questions else folder / "questions.jsonl"
        if not args.questions:
            path.write_text(
                "".join(
                    json.dumps({"activity_label": "Story", "ctx_a": "It was so:",
                                "ctx_b": text, "endings": endings, "label": str(label)}) + "\n"
                    for text, endings, label in STORIES
                )
            )  # fmt: skip
        (folder / "questions.yaml").write_text(TASK.format(path=path.resolve()))
        settings = edgeq.ServerSettings(port=0, parallel=4, queue=64)
        with edgeq.Server([("model", args.model)], settings, threads=1) as server:
            command = [
                sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args",
                f"model=model,base_url={server.url}/v1/completions,"
                f"tokenizer={args.tokenizer or args.model},"
                "tokenizer_backend=huggingface,add_bos_token=True,num_concurrent=4,"
                "max_length=512",
                "--tasks", "questions", "--include_path", place, "--output_path",
                str(folder / "found"),
            ]  # fmt: skip
            offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
            subprocess.run(command, check=True, env={**os.environ, **offline})
        (written,) = (folder / "found").rglob("results_*.json")
        found = json.loads(written.read_text())["results"]["questions"]
        own = edgeq.evaluate(args.model, path, layout="hellaswag", context=512, threads=1)
    print(f"lm-eval {version('lm-eval')}: acc {found['acc,none']:.4f}, "
          f"acc_norm {found['acc_norm,none']:.4f}")  # fmt: skip
    print(f"edgeq eval: acc {own.accuracy:.4f}, acc_norm {own.accuracy_normalized:.4f}, "
          f"{own.n} questions")  # fmt: skip


if __name__ == "__main__":
    main()
