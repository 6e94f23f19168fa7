"""Settings: what may be set, which settings contradict each other, reading, and sentences on them.

This file re-exports what other parts use; `reading` and `wording` are only for the commands.
"""

from service.settings.sections import (
    CacheSettings,
    EndpointSettings,
    Example,
    ExtractionSettings,
    InputSettings,
    KafkaSettings,
    Price,
    RetrySettings,
    SecuritySettings,
    Start,
    TelemetrySettings,
    ToldPrice,
    legal_headers,
    legal_url,
)
from service.settings.settings import Settings, warnings

__all__ = [
    "CacheSettings",
    "EndpointSettings",
    "Example",
    "ExtractionSettings",
    "InputSettings",
    "KafkaSettings",
    "Price",
    "RetrySettings",
    "SecuritySettings",
    "Settings",
    "Start",
    "TelemetrySettings",
    "ToldPrice",
    "legal_headers",
    "legal_url",
    "warnings",
]
