"""The Kubernetes job of the example against the schemas of Kubernetes, where `kubernetes-validate` is installed."""

import os
import pathlib

import pytest

FILE = pathlib.Path(__file__).parents[2] / "examples" / "multihost" / "kubernetes.yaml"


def test_the_job_is_one_that_kubernetes_takes():
    schemas = pytest.importorskip("kubernetes_validate")
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all(FILE.read_text())
    for resource in (service, job):
        schemas.validate(resource, schemas.latest_version(), strict=True)
    on_exit = job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert on_exit["values"] == [os.EX_TEMPFAIL]
    del on_exit["operator"]
    with pytest.raises(schemas.ValidationError):  # the schemas know these rules
        schemas.validate(job, schemas.latest_version(), strict=True)
