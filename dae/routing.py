"""Which teacher belongs to which route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

UNNAMED = "domain"  # the name of an expert without one
GENERAL = "general"
DOMAIN_SHARE = 0.1  # of all rows, over all domain routes together, unless the recipe has shares

Teacher = TypeVar("Teacher")


def teachers_by_route(reference: Teacher, experts: Mapping[str, Teacher]) -> dict[str, Teacher]:
    """Route name -> teacher: the reference on `general`, each expert on the route of its name."""
    assert GENERAL not in experts, "`general` is the reference's route"
    return {GENERAL: reference, **experts}


def default_route_shares(experts: Mapping[str, object]) -> dict[str, float]:
    """Each route's share of rows: a tenth for all domains together, the rest general (arXiv 2406.19112)."""
    domains = {name: DOMAIN_SHARE / len(experts) for name in experts}
    return {GENERAL: 1.0 - DOMAIN_SHARE, **domains}
