"""How a model is asked after its endpoint has refused a parameter or a form of the schema.

Rules of this file: what is learned is kept in the model's `Step`; a change is said when it is made.
"""

from __future__ import annotations

import logging

from service.llm.cascade import OTHER_NAME, Step
from service.llm.failures import FORM
from service.llm.request import Form, RequestTemplate

log = logging.getLogger(__name__)


def adapted(step: Step, asked: RequestTemplate, parameter: str) -> bool:
    """Whether the same call is to be made again without what was refused: another call may
    have found it out in the meantime."""
    if parameter == FORM:
        return _another_form(step, asked.form)
    if not step.sends(parameter):
        return parameter in step.not_taken
    if not step.does_not_take(parameter):
        return False
    other = OTHER_NAME.get(parameter)
    log.warning(
        "%s does not take %s for %s: %s from now on",
        step.connection.endpoint.base_url,
        parameter,
        step.model,
        "it is left out" if other is None else f"{other} is sent",
    )
    return True


def _another_form(step: Step, refused: Form) -> bool:
    if step.request.form != refused:
        return True
    there_is = step.does_not_take_form(refused)
    if there_is:
        now = step.request.form
        log.warning(
            "%s does not take the schema %s for %s: it is asked for %s from now on",
            step.connection.endpoint.base_url,
            _described(refused),
            step.model,
            _described(now),
        )
    return there_is


def _described(form: Form) -> str:
    return f"as {form.mode}" + (", strict" if form.strict else "")
