"""Evaluation tasks, the targets they run against, and what they measure."""
