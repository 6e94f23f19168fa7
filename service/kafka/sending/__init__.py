"""Outside of transactions: output queues, the idempotent producer, and what topics take."""
