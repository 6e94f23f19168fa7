"""One random walk over everything between Kafka's wire and the model's, under virtual time.

    python -m tests.walk --seed 17                         one walk, again
    python -m tests.walk --seeds 10000 --from 0 --jobs 2   a night's worth
    pytest tests/walk                                      what CI runs

What stands where: `plan` draws what happens and shrinks it, `wire` is Kafka as its client sees it,
`model` the model, `ledger` what must be true of the logs, `inside` the only look into private
parts of the service, `invariants` what must be true of a worker at every moment, `play` runs one
plan.
"""
