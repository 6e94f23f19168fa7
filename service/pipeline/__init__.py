"""The way of a message: poll, window, admission, call, lane, publish, finish, commit.

It reads straight down: intake → calls → asking → publishing → commits.
"""

from service.pipeline.bounds import Bounds, Later
from service.pipeline.pipeline import Pipeline

__all__ = ["Bounds", "Later", "Pipeline"]
