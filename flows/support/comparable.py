"""What of a comparison can run: which methods on this machine, and what its held-out rows allow."""

from __future__ import annotations

from tasks.analysis.compared_runs import BaseFigures
from tasks.analysis.methods import settings_of
from tasks.comparison.measure_forgetting import read_text
from tasks.comparison.measure_second_data import second_settings
from tasks.engine.artifacts import Artifact
from tasks.engine.errors import UserError
from tasks.runs.preflight import check_data, check_settings
from tasks.settings.comparison import FAULT, ComparedMethod, CompareSettings
from tasks.settings.finetune import FinetuneSettings


def runnable(
    settings: FinetuneSettings, comparison: CompareSettings
) -> tuple[dict[ComparedMethod, FinetuneSettings], dict[str, str]]:
    """Settings of the methods that can be trained here, and why others cannot.

    Raises:
        UserError: the first method cannot, or the text or the second data set is not there.
    """
    if comparison.forgetting_text:
        read_text(str(comparison.forgetting_text))
    if comparison.second_data:
        second = second_settings(settings.data, comparison.second_data)
        try:
            check_data(second)
        except UserError as error:
            fix = "This is `second_data`, whose columns cannot be mapped: name another file, or mend this one."
            raise UserError(error.what, where=error.where, fix=fix) from None
    methods: dict[ComparedMethod, FinetuneSettings] = {}
    not_run: dict[str, str] = {}
    for method in comparison.methods:
        if method == FAULT:
            continue
        own = settings_of(method, settings)
        try:
            check_settings(own)
        except UserError as error:
            if not methods:
                raise
            not_run[method] = str(error)
        else:
            twin = next((name for name, other in methods.items() if other == own), None)
            if twin:
                fix = "Leave one of them out."
                raise UserError(f"{method} and {twin} are the same with these settings", where="methods", fix=fix)
            methods[method] = own
    return methods, not_run


def check_held_out(comparison: CompareSettings, dataset: Artifact, base: BaseFigures) -> None:
    """Refuse, before anything is trained, what needs held-out rows where there are none.

    Args:
        comparison: what is asked for.
        dataset: its count of validation rows.
        base: the base model's answers.

    Raises:
        UserError: rates are to be chosen, or answers judged, and there is nothing to do it by.
    """
    if comparison.learning_rates and not dataset.facts["rows"]["validation"]:
        fix = "Hold rows out: data.validation_fraction."
        raise UserError("there are no validation rows to choose a rate by", where="learning_rates", fix=fix)
    if comparison.judge_model and not base.answers.facts["answers"]:
        fix = "Ask for some with `answers` and hold rows out, or leave judge_model out."
        raise UserError("there are no answers to judge", where="judge_model", fix=fix)
