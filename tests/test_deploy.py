"""The examples for systemd and Kubernetes: options that the service takes, probes that it answers, time to drain.

The schemas of Kubernetes' resources are not at hand without a network: what refers to something is checked by hand.
"""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.app import OPEN_PATHS, routes
from service.configure import DEFAULT_NAME
from service.engine_metrics import InFlightMetrics
from service.settings import Settings, read

ROOT = Path(__file__).parent.parent


def settings_of(command: list[str], environment: dict[str, str]) -> Settings:
    program, flag, module, *options = command
    assert (Path(program).name, flag, module) == ("python", "-m", "service")
    return read(options, environment).settings(Path("/models/mine"), "mine")


@pytest.fixture(scope="module")
def unit() -> dict[str, str]:
    """The settings of the unit's [Service]."""
    text = (ROOT / "deploy" / "rootstock.service").read_text().split("[Service]\n")[1].split("\n[Install]")[0]
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    settings = dict(line.split("=", 1) for line in lines)
    assert len(settings) == len(lines)
    return settings


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    found = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
    return {each["kind"]: each for each in found}


@pytest.fixture(scope="module")
def container(manifests: dict[str, Any]) -> dict[str, Any]:
    [container] = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def test_systemd_signals_the_service_alone_and_waits_until_it_has_drained(unit: dict[str, str]) -> None:
    settings = settings_of(shlex.split(unit["ExecStart"]), {})
    assert unit["KillMode"] == "mixed", "a signal to the engine would end it before its requests"
    assert int(unit["TimeoutStopSec"]) >= settings.drain_seconds + 10
    assert int(unit["LimitNOFILE"]) > 2 * settings.max_connections


def test_systemd_gives_the_service_directories_that_it_may_write_to(unit: dict[str, str]) -> None:
    places = {"%S": "/var/lib", "%C": "/var/cache"}
    given = dict(pair.split("=") for pair in unit["Environment"].split())
    for short, long in places.items():
        given = {name: value.replace(short, long) for name, value in given.items()}
    settings = settings_of(shlex.split(unit["ExecStart"]), given)
    assert settings.data_directory == Path("/var/lib") / unit["StateDirectory"]
    assert (Path("/var/cache") / unit["CacheDirectory"]) in settings.cache_directory.parents


def test_kubernetes_asks_for_what_is_answered_without_a_key(container: dict[str, Any]) -> None:
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    served = {route.path for route in routes}
    for probe in probes.values():
        assert probe["path"] in OPEN_PATHS & served
        assert probe["port"] in [port["name"] for port in container["ports"]]
    assert probes["liveness"]["path"] == "/health", "an engine that is restarted is no reason to end the service"
    assert probes["readiness"]["path"] == probes["startup"]["path"] == "/health/ready"


def test_kubernetes_waits_until_the_service_has_drained(manifests: dict[str, Any], container: dict[str, Any]) -> None:
    settings = settings_of(container["args"], {"ROOTSTOCK_API_KEY": "secret"})
    before = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= before + settings.drain_seconds + 10
    assert settings.store is not None


def test_kubernetes_names_what_there_is(manifests: dict[str, Any], container: dict[str, Any]) -> None:
    deployment = manifests["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == manifests["Service"]["spec"]["selector"] == labels
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in deployment["template"]["spec"]["volumes"]}
    assert manifests["Service"]["spec"]["ports"][0]["targetPort"] in [port["name"] for port in container["ports"]]


def test_kubernetes_scales_by_a_metric_that_the_service_has(
    manifests: dict[str, Any], container: dict[str, Any]
) -> None:
    scaler = manifests["HorizontalPodAutoscaler"]
    assert scaler["apiVersion"] == "autoscaling/v2", "the version with metrics of pods"
    spec = scaler["spec"]
    target = {name: manifests["Deployment"][name] for name in ("apiVersion", "kind")}
    assert spec["scaleTargetRef"] == {**target, "name": manifests["Deployment"]["metadata"]["name"]}
    assert "replicas" not in manifests["Deployment"]["spec"], "each `kubectl apply` would set it back"
    assert 1 < spec["minReplicas"] < spec["maxReplicas"]
    [metric] = spec["metrics"]
    assert metric["type"] == "Pods"
    assert metric["pods"]["target"].keys() == {"type", "averageValue"}
    served = {f"vllm_{each.name.removeprefix('vllm:')}" for each in InFlightMetrics(0, 0, "tiny").collect()}
    assert metric["pods"]["metric"]["name"] in served
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    period = spec["behavior"]["scaleDown"]["policies"][0]["periodSeconds"]
    assert period >= pod["terminationGracePeriodSeconds"], "one drains after another"
    assert settings_of(container["args"], {"ROOTSTOCK_API_KEY": "secret"}).open_metrics, "Prometheus has no key"


def test_kubernetes_keeps_the_events_of_prompts_to_the_endpoint_picker(
    manifests: dict[str, Any], container: dict[str, Any]
) -> None:
    settings = settings_of(container["args"], {"ROOTSTOCK_API_KEY": "secret"})
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert settings.kv_events == f"tcp://*:{ports['kv-events']}"
    kind, pod, model = settings.kv_events_topic.split("@")
    assert (kind, pod, model) == ("kv", "$(POD_IP)", DEFAULT_NAME)
    variables = {each["name"]: each for each in container["env"]}
    assert "POD_IP" in variables
    assert "optional" not in variables["ROOTSTOCK_API_KEY"]["valueFrom"]["secretKeyRef"], "no pod starts without a key"
    policy = manifests["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == manifests["Service"]["spec"]["selector"]
    open_to = {rule["ports"][0]["port"]: rule.get("from") for rule in policy["ingress"]}
    assert open_to == {"http": None, "kv-events": [{"podSelector": {"matchLabels": {"app": "rootstock-epp"}}}]}


def test_an_inference_gateway_reaches_the_replicas(manifests: dict[str, Any], container: dict[str, Any]) -> None:
    found = yaml.safe_load_all((ROOT / "deploy" / "inferencepool.yaml").read_text())
    kinds = {each["kind"]: each for each in found}
    pool, route = kinds["InferencePool"], kinds["HTTPRoute"]
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert pool["spec"].keys() == {"selector", "targetPorts", "endpointPickerRef"}, "what v1 requires, and no more"
    assert pool["spec"]["selector"]["matchLabels"] == manifests["Service"]["spec"]["selector"]
    assert pool["spec"]["targetPorts"] == [{"number": container["ports"][0]["containerPort"]}]
    picker = pool["spec"]["endpointPickerRef"]
    assert picker.keys() == {"name", "port", "failureMode"}
    assert picker["failureMode"] in ("FailOpen", "FailClose")
    [policy] = [rule for rule in manifests["NetworkPolicy"]["spec"]["ingress"] if "from" in rule]
    assert picker["name"] == policy["from"][0]["podSelector"]["matchLabels"]["app"]
    of_generation, of_all = route["spec"]["rules"]
    [to_pool], [to_service] = of_generation["backendRefs"], of_all["backendRefs"]
    assert (to_pool["group"], to_pool["kind"]) == (pool["apiVersion"].split("/")[0], pool["kind"])
    assert to_pool["name"] == pool["metadata"]["name"]
    assert to_service["name"] == manifests["Service"]["metadata"]["name"]
    assert to_service["port"] == manifests["Service"]["spec"]["ports"][0]["port"]


def test_docker_compose_waits_until_the_service_has_drained() -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["rootstock"]
    settings = settings_of(service["command"].split(), {})
    assert int(service["stop_grace_period"].removesuffix("s")) >= settings.drain_seconds + 10
