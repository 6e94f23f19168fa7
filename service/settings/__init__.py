"""Settings: what may be set, what cannot stand together, how it is read and what is said of it.

This page re-exports what other parts ask for; reading and wording are for the commands.
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
