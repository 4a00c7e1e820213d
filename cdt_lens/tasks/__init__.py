"""Turn labelled text into batches of prompts, and define the task direction and accuracy.

1. `rows.py` reads a row, with its place for error messages, from a file or the hub.
2. `prompts.py` turns the row into a prompt whose next token is the answer, and into an `Example`
   with the token ids that are correct and those that compete.
3. `task.py` groups examples into splits (`Examples`) and a `Task`, and pads them into a `Batch`.
4. `metrics.py` defines the measures once for the whole package. The task direction of an example is
   d = logit[gold label] - mean logit[other labels], in logits (docs/method/task.md). Positive
   values are towards the gold label. Accuracy is defined there too, and `evaluate.py` measures a
   model.

`datasets.py` loads tasks by name, from files and from the hub, and `mib.py` the tasks of MIB.
`generated.py` and `pseudo_languages.py` generate tasks without data.
"""
