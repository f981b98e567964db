"""Admission policies by name: who of those that wait may begin."""

from collections.abc import Callable

from elbowroom.engine.admission.base import AdmissionPolicy, Outlook
from elbowroom.registry import Registry

ADMISSIONS: Registry[Callable[..., AdmissionPolicy]] = Registry(
    "admission policy",
    {
        "greedy": "elbowroom.engine.admission.greedy:GreedyAdmission",
        "conservative": "elbowroom.engine.admission.conservative:ConservativeAdmission",
        "past_future": "elbowroom.engine.admission.past_future:PastFutureAdmission",
        "past_future_paper": "elbowroom.engine.admission.past_future_paper:PastFuturePaperAdmission",
        "oracle": "elbowroom.engine.admission.oracle:OracleAdmission",
    },
)

__all__ = ["ADMISSIONS", "AdmissionPolicy", "Outlook"]
