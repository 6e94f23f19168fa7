"""Whether one more call may start now: slots, budgets, pace, circuit, retries, hedges, guard."""
