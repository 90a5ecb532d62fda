"""Every shipped cluster configuration passes the validation of what reads it, without any cloud."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
RAY_UP, KUBERAY = ["aws", "gcp"], ["raycluster", "rayjob"]
RAY_VERSION = re.search(
    r"^ray==(\S+)$", (CLUSTER.parent / "constraints.txt").read_text(), re.MULTILINE
)


def load(name: str) -> dict[str, Any]:
    content = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    assert isinstance(content, dict)
    return content


def test_every_shipped_file_is_checked_here() -> None:
    assert sorted(path.stem for path in CLUSTER.glob("*.y*ml")) == sorted(RAY_UP + KUBERAY)


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_itself_accepts_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(load(name)))
    validate_config(prepared)
    assert (
        prepared["setup_commands"]
        == prepared["head_setup_commands"]
        == prepared["worker_setup_commands"]
        == []
    )


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_itself_refuses_a_broken_one(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    broken = load(name) | {"max_wrokers": 3}
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", RAY_UP)
def test_gpus_cost_nothing_while_idle(name: str) -> None:
    config = load(name)
    workers = {
        key: kind
        for key, kind in config["available_node_types"].items()
        if key != config["head_node_type"]
    }
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    assert all(
        kind["min_workers"] == 0 and kind["resources"]["GPU"] >= 1 for kind in workers.values()
    )
    assert 0 < config["idle_timeout_minutes"] <= 15
    spot = max(workers.values(), key=lambda kind: kind["priority"])
    assert "spot" in str(spot["node_config"]).lower()
    assert any("spot" not in str(kind["node_config"]).lower() for kind in workers.values())


@pytest.mark.parametrize("name", RAY_UP)
def test_the_dashboard_is_private_and_asks_for_a_token(name: str) -> None:
    start = " ".join(load(name)["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "RAY_AUTH_MODE=token" in start
    assert "RAY_AUTH_MODE=token" in " ".join(load(name)["worker_start_ray_commands"])


def cluster_spec(name: str) -> dict[str, Any]:
    spec = load(name)["spec"]
    found = spec if name == "raycluster" else spec["rayClusterSpec"]
    assert isinstance(found, dict)
    return found


def test_the_job_brings_up_the_same_cluster() -> None:
    assert cluster_spec("rayjob") == cluster_spec("raycluster")


def test_kubernetes_workers_start_at_none_with_token_and_fault_tolerance() -> None:
    spec = cluster_spec("raycluster")
    assert all(group["replicas"] == group["minReplicas"] == 0 for group in spec["workerGroupSpecs"])
    assert (spec["authOptions"]["mode"], spec["autoscalerOptions"]["version"]) == ("token", "v2")
    assert spec["gcsFaultToleranceOptions"]["redisAddress"]
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_one_ray_version_everywhere() -> None:
    assert RAY_VERSION
    assert cluster_spec("raycluster")["rayVersion"] == RAY_VERSION[1]
    assert f"FROM rayproject/ray:{RAY_VERSION[1]}-" in (CLUSTER / "Containerfile").read_text()


@pytest.mark.skipif(
    "KUBERAY_CRDS" not in os.environ, reason="set KUBERAY_CRDS to ray-operator/config/crd/bases"
)
@pytest.mark.parametrize("name", KUBERAY)
def test_the_operators_schema_accepts_it(name: str) -> None:
    """KUBERAY_CRDS: that folder of a checkout of github.com/ray-project/kuberay, v1.5 or newer."""
    validator = crd_validator(f"{name}s")
    assert [error.message for error in validator.iter_errors(load(name))] == []
    broken = load(name)
    broken["spec"]["rayVerison"] = "2"
    assert [error.message for error in validator.iter_errors(broken)]


def crd_validator(kind: str) -> jsonschema.Draft202012Validator:
    """The CRD's schema, closed: Kubernetes drops unknown fields in silence, here they are
    errors.
    """
    crd = yaml.safe_load((Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{kind}.yaml").read_text())
    schema = next(
        v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"
    )
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(close(schema))


def close(schema: Any) -> Any:
    if isinstance(schema, list):
        return [close(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: close(value) for key, value in schema.items()}
    if closed.pop("x-kubernetes-int-or-string", False):
        closed = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def test_the_local_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / "local.sh")], check=True)
