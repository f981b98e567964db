"""Workloads: requests with arrival times, made or read from traces, replayed simulated or for real, and measured."""
