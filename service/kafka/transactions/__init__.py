"""Exactly once: outputs, next offset and completed map in one Kafka transaction."""
