"""`sluice demo`: the embedded broker, the local model and the live view."""
