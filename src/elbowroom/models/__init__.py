"""Models: decoder families, their files, tokenizers and chat templates."""
