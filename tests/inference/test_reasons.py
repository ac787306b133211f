"""Every code that a MAP's failure may have is explained."""

import ast
import inspect
from typing import get_args

from services.inference import outputs
from services.inference.reasons import REASONS, explained
from services.inference.serving.runner import Outcome
from services.inference.targets import dicomweb, healthimaging, import_job, stow, target


def test_every_reason_is_explained_and_no_other():
    """What the runner, the check of outputs and the targets give has words and a remedy, in whole sentences."""
    raised = {
        node.args[0].value
        for module in (outputs, dicomweb, healthimaging, import_job, stow, target)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in {"OutputRefused", "PushRejected"}
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    given = set(get_args(Outcome)) - {"ran", "no_matching_series"} | raised | {"push_rejected"}

    assert set(REASONS) == given
    assert all(remedy.endswith(".") and not what.endswith(".") for what, remedy in REASONS.values())
    assert "does not know" in explained("from_the_future")[0]
