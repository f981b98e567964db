"""Batches: files of requests, answered once each, whatever interrupts the run."""

from __future__ import annotations

from elbowroom.serve.batch.job import BatchOptions, BatchReport, BatchViewer, forecast_batch, run_batch
from elbowroom.serve.batch.journal import OutputFailed

__all__ = ["BatchOptions", "BatchReport", "BatchViewer", "OutputFailed", "forecast_batch", "run_batch"]
