"""Documents as the services store them: whole, made from the few values that a test is about."""

TIME = "2026-01-01T00:00:00Z"
SERIES = {"study_uid": "1.2", "series_uid": "1.2.3", "digest": "f" * 32, "revision_key": "any"}
RUN = {"map": "a_map", "map_digest": "e" * 16, "inputs": [SERIES], "attempt": "one", "time": TIME}
QUALITY = {"kid_spread": 0.1, "precision": 0.5, "recall": 0.5, "density": 0.5, "sliced_wasserstein": 0.1}
EVALUATION = {
    "metric": "FD",
    "space": "s",
    "n": 8,
    "distance": 3.0,
    "floor": 2.0,
    "relative_fd": 1.5,
    "quality": QUALITY | {"coverage": 0.5, "kid": 0.1},
    "real_quality": QUALITY | {"coverage": 0.75, "kid": 0.0},
    "memorisation": {"n": 8, "n_held_out": 8, "copied_share": 0.5, "far_nearer_share": 0.5, "flagged": True},
    "warnings": ["few_images"],
}
ROUND = {
    "request_id": "r",
    "dataset": "d",
    "round": 1,
    "steps": 10,
    "rule": "first",
    "approved": False,
    "duration_s": 1.0,
    "evaluation": EVALUATION,
    "config": {},
    "config_key": "any",
}
COMPLETED = {
    "request_id": "r",
    "dataset": "d",
    "approved": False,
    "rounds": 1,
    "evaluation": EVALUATION,
    "config": {},
    "generator_key": "g",
    "images_key": "i",
    "images_array_key": "a",
}


def revision(study_uid, digest, **told):
    """Return a revision of a study's first series."""
    instance = {"sop_instance_uid": "1.2.3.4", "sha": "0" * 16, "key": "any"}
    uids = {"study_uid": study_uid, "series_uid": f"{study_uid}.1", "digest": digest}
    return {"dataset": "d", **uids, "created": TIME, "instances": [instance]} | told


def routing(*maps, **told):
    """Return a routing.json."""
    given = [{"map": name, "map_digest": "e" * 16} for name in maps]
    return {"maps": given, "modality": "CT", "time": TIME} | told


def output(uid, key="any"):
    """Return an instance that a MAP made."""
    return {"sop_class_uid": "1.2.840", "sop_instance_uid": uid, "series_uid": "1.9", "key": key, "image_set_id": None}


def outputs(**told):
    """Return an outputs.json."""
    return {"attempt": "one", "outputs": [], "duration_s": 1.0, "device": "cpu", "time": TIME} | told


def result(**told):
    """Return a result.json."""
    return RUN | {"outcome": "completed", "result_key": "any", "duration_s": 1.0} | told


def failure(**told):
    """Return a failure.json."""
    return RUN | {"request_id": "r", "reason_code": "deadline", "failure_key": "any"} | told


def evaluated(**told):
    """Return the evaluation.json of a round."""
    trained = {"checkpoint_key": "any", "margin": 0.0, "device": "cpu", "losses": []}
    return trained | {"told": ROUND | told, "time": TIME, "images_key": "any", "continued_from": 0, "n_features": 8}


def completed(**told):
    """Return the completed.json of a training."""
    return {"told": COMPLETED | told, "time": TIME, "best_round": 1}
