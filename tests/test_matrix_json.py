"""`faults.json`, of a matrix that was made up."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema

from dpsgd_track.comparison.diagnose.culprit import Culprit
from dpsgd_track.comparison.result import ModeVerdict
from dpsgd_track.comparison.verdict import Verdict
from dpsgd_track.mutants.catalogue import MUTANTS
from dpsgd_track.mutants.matrix import Matrix, Row
from dpsgd_track.mutants.matrix_json import MATRIX, matrix_json
from dpsgd_track.record.stages import ObservableName, Stage

FOUND = Row(
    fault=MUTANTS["sign_flipped"],
    mode="flash_fsdp",
    label="flash_fsdp+sign_flipped",
    verdict=Verdict.BUG,
    sentence="it differs",
    culprit=Culprit(
        stage=Stage.SUM,
        regime="probe-clip",
        step=0,
        places=("gate.weight",),
        observable=ObservableName.GRADIENT,
    ),
    num_places=25,
    naive_saw=False,
    found_in=("probe-clip",),
)
MISSED = replace(FOUND, verdict=Verdict.PASS, culprit=None, found_in=(), redactions=("norms",))
HEALTHY = ModeVerdict(label="flash_fsdp", verdict=Verdict.PASS, findings=(), sentence="all agree")
TEXT = matrix_json(
    Matrix(
        group="g",
        rows=(FOUND, MISSED),
        healthy=(HEALTHY,),
        naive_alarms=(),
        settings="2 ranks",
    )
)


def test_faults_json_says_of_each_fault_what_was_blamed_and_what_should_be() -> None:
    document = json.loads(TEXT)
    found, missed = document["rows"]
    assert found == {
        "fault": "sign_flipped",
        "kind": FOUND.fault.kind,
        "mode": "flash_fsdp",
        "label": "flash_fsdp+sign_flipped",
        "verdict": "BUG",
        "is_detected": True,
        "stage": "clipped sum",
        "regime": "probe-clip",
        "step": 0,
        "layers": ["gate.weight"],
        "observable": "gradient",
        "expected_stage": FOUND.fault.stage,
        "expected_layers": list(FOUND.fault.where),
        "has_right_stage": FOUND.has_right_stage,
        "has_right_place": FOUND.has_right_place,
        "naive_saw": False,
        "found_in": ["probe-clip"],
        "excuse": "",
        "redactions": [],
        "stand_in_for": "",
        "sentence": "it differs",
    }
    blamed = [missed[key] for key in ("stage", "regime", "step", "layers", "observable")]
    assert blamed == [None, None, None, [], None]
    assert (missed["is_detected"], missed["redactions"]) == (False, ["norms"])
    assert document["healthy"] == [
        {"mode": "flash_fsdp", "verdict": "PASS", "sentence": "all agree"}
    ]


def test_faults_json_meets_its_schema_and_is_read_back() -> None:
    schema = MATRIX.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(TEXT))
    assert MATRIX.dumps(MATRIX.loads(TEXT), indent=2) + "\n" == TEXT
