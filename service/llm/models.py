"""The models that are asked, the connection to each, and the check before the first call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from service.core.errors import WrongSettings
from service.llm.cascade import LONGER_FACTOR, Cascade, Step
from service.llm.connection import Connection
from service.llm.endpoint import (
    Endpoint,
    endpoint_of,
    listed_models,
    missing_models,
    only_model,
)
from service.llm.prices import cost_of
from service.llm.records import RecordType
from service.llm.request import Question
from service.settings import Settings

NO_PRICE = (
    "limits.spend_usd_per_hour: no price is known for the model {model!r} at {url}, so that "
    "nothing would ever be counted: set prices: {{{model}: {{input: …, output: …}}}} (US dollars "
    "for a million tokens), or prices: {{{model}: gateway}} where answers tell their cost "
    "(x-litellm-response-cost, usage.cost), or leave the limit out."
)


class Models:
    """The connections, and the cascade of the models over them.

    `cascade` is another one once `check` has found the only model of an endpoint, where the
    settings name none.
    """

    def __init__(
        self, settings: Settings, main: Endpoint, record_type: RecordType, question: Question
    ) -> None:
        """Raises `WrongSettings` and `CannotRun`."""
        self._settings, self._extraction = settings, settings.extraction
        self._record_type, self._question = record_type, question
        self._connections = {
            name: self._connection(endpoint_of(name, given))
            for name, given in settings.extraction.endpoints.items()
        }
        self._connection_main = self._connection(main)
        self._choose(settings.extraction.model)

    def _connection(self, endpoint: Endpoint) -> Connection:
        connections_max = self._settings.limits.concurrency + 1  # and one for the check
        return Connection(endpoint, connections_max, self._extraction.answer_max_bytes)

    def _choose(self, models: Sequence[str]) -> None:
        """Ask these models; none are known yet where the settings name none."""
        self.names = tuple(models)
        steps = [self._step(model) for model in models or ("",)]
        self.cascade = Cascade(steps, self._record_type, self._extraction)

    def _step(self, model: str) -> Step:
        connection = self._connections.get(model, self._connection_main)
        base_url = connection.endpoint.base_url
        cost = cost_of(model, self._settings.prices, base_url)
        if model and cost is None and self._settings.limits.spend_usd_per_hour is not None:
            raise WrongSettings(NO_PRICE.format(model=model, url=base_url))
        return Step(
            model,
            connection,
            forms=self._question.forms,
            ask_in=partial(self._question.template, model, base_url),
            longer_max=LONGER_FACTOR * self._extraction.output_tokens_max,
            cost=cost,
        )

    @property
    def named(self) -> list[list[str]]:
        """Each step's model and where it is asked, in the cascade's order."""
        return [[step.model, step.connection.endpoint.base_url] for step in self.cascade.steps]

    async def open(self) -> None:
        """Open the clients; no traffic yet."""
        for connection in self._all_connections:
            await connection.open()

    async def close(self) -> None:
        """Close the connections; calls in flight are to be cancelled first."""
        for connection in self._all_connections:
            await connection.close()

    @property
    def _all_connections(self) -> tuple[Connection, ...]:
        return (self._connection_main, *self._connections.values())

    async def check(self) -> str | None:
        """Whether the endpoints can be reached, at no cost: None, or a warning in a sentence.

        Where the settings name no model, it is the only one that the endpoint lists. Raises
        `CannotRun` where calls would fail too, and `WrongSettings` where no model can be chosen. An
        endpoint that lists no models is fine where they are named, and so is a key that may call
        but not list.
        """
        warnings = [
            await self._look_at(connection)
            for connection in dict.fromkeys(step.connection for step in self.cascade.steps)
        ]
        return " ".join(filter(None, warnings)) or None

    async def _look_at(self, connection: Connection) -> str | None:
        response = await connection.models()
        names = None if isinstance(response, str) else listed_models(response)
        if not self.names:
            self._choose((only_model(connection.endpoint, names),))
        if isinstance(response, str):
            return response
        asked = [step.model for step in self.cascade.steps if step.connection is connection]
        return missing_models(connection.endpoint, asked, names)
