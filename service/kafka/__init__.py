"""aiokafka behind the pipeline's Source and Sink."""
