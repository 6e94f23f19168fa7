"""The embedded broker, the local model and the live view of sluice demo."""
