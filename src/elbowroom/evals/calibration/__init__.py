"""Calibration: measurements of a model that KV plans ask for, made once with facts hidden in text."""
