"""Comparisons of KV plans on the same questions: what is measured, what the runs said, who is better at equal bytes."""
