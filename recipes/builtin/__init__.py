"""Recipe of the built-in model: tokenizer, data, training tasks, training, export, evaluation."""
