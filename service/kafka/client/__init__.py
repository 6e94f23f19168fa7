"""What this service adds to the Kafka client: options, errors, requests that it lacks."""
