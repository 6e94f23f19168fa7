"""One member of the consumer group: what it holds, from where it reads, and who watches it."""
