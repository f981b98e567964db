"""Recipe of the small model that thinks: tokenizer, shape, training, export."""
