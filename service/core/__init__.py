"""Pure parts: no I/O, no clock, no environment; time and randomness come in as arguments."""
