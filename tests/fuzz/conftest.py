"""How much: few and always the same problems by default, and other ones with each seed under ``make fuzz``."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=40, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=400, print_blob=True, **COMMON)
settings.load_profile("short")
