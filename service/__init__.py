"""Sluice: text messages in, validated records out, on Kafka."""
