"""From text files to a dataset: sources -> tokenizer -> chunks and manifest -> baselines."""
