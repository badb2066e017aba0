"""examples/kubernetes: the manifest and the Dockerfile name what there is, and their numbers agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from served import serving
from starlette.routing import Route
from tiny_bundles import attention_bundle

from edgellm.cli.serve import _named, serve
from edgellm_runtime.server.options import ServerOptions

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "examples/kubernetes"
DEPLOYMENT, SERVICE = yaml.safe_load_all((FOLDER / "edgellm.yaml").read_text(encoding="utf-8"))
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
BYTES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command line makes of the container's arguments and environment."""
    for entry in CONTAINER["env"]:
        monkeypatch.setenv(entry["name"], entry.get("value", "a-key-of-a-secret"))
    command, *arguments = CONTAINER["args"]
    assert command == serve.name
    return serve.make_context("serve", list(arguments)).params


def test_every_flag_is_one_of_the_commands(said: dict[str, Any]) -> None:
    known = {option for parameter in serve.params for option in parameter.opts}
    flags = {argument.split("=")[0] for argument in CONTAINER["args"] if argument.startswith("-")}
    assert flags <= known
    assert {"--host", "--port", "--drain", "--max-memory"} <= flags
    (name,) = _named(said["bundles"])
    assert name == "model"
    ServerOptions(host=said["host"], port=said["port"], api_keys=said["api_keys"], drain=said["drain"])


def test_the_key_comes_from_a_secret_by_the_variable_that_the_command_reads(said: dict[str, Any]) -> None:
    assert said["api_keys"] == ("a-key-of-a-secret",)
    (key,) = [entry for entry in CONTAINER["env"] if entry["name"] == "EDGELLM_API_KEY"]
    assert key["valueFrom"]["secretKeyRef"] == {"name": "edgellm", "key": "api-key"}
    assert "value" not in key


def test_probes_ask_routes_that_answer_without_a_key_by_any_name(said: dict[str, Any]) -> None:
    probes = [CONTAINER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    with serving({"model": attention_bundle()}, host=said["host"], api_keys=said["api_keys"]) as served:
        routes = [r for r in served.server.config.app.routes if isinstance(r, Route)]  # type: ignore[union-attr]
        assert {probe["path"] for probe in probes} <= {route.path for route in routes}
        for probe in probes:
            found = httpx.get(f"{served.address}{probe['path']}", headers={"host": "10.0.0.7:8000"})
            assert found.status_code == 200
        assert httpx.get(f"{served.address}/v1/models").status_code == 401


def test_ports_and_labels_lead_from_the_service_to_the_server(said: dict[str, Any]) -> None:
    (port,) = CONTAINER["ports"]
    assert port == {"name": "http", "containerPort": said["port"]}
    assert {CONTAINER[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")} == {"http"}
    assert [entry["targetPort"] for entry in SERVICE["spec"]["ports"]] == ["http"]
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels


def test_a_pod_has_the_time_that_its_server_takes_to_drain(said: dict[str, Any]) -> None:
    before = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] >= before + said["drain"] + 5


def test_the_bundle_lies_on_a_volume_that_is_only_read(said: dict[str, Any]) -> None:
    (mount,), (volume,) = CONTAINER["volumeMounts"], POD["volumes"]
    assert mount["name"] == volume["name"]
    assert mount["readOnly"] and volume["persistentVolumeClaim"]["readOnly"]
    (path,) = _named(said["bundles"]).values()
    assert path.is_relative_to(mount["mountPath"])


def test_memory_and_cores_are_what_the_server_is_told(said: dict[str, Any]) -> None:
    limits = CONTAINER["resources"]["limits"]
    assert limits == CONTAINER["resources"]["requests"]
    assert limits["cpu"].isdecimal()
    number, unit = re.fullmatch(r"(\d+)(\w+)", limits["memory"]).groups()  # type: ignore[union-attr]
    assert said["max_memory"] < 0.8 * int(number) * BYTES[unit]


def test_a_pod_has_no_rights_and_writes_nothing() -> None:
    assert POD["securityContext"]["runAsNonRoot"]
    assert POD["automountServiceAccountToken"] is False
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert {"name": "EDGELLM_CACHE_DIR", "value": ""} in CONTAINER["env"]


def test_the_image_is_the_dockerfiles() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"-t {CONTAINER['image']} " in text
    assert CONTAINER["image"] == f"edgellm:{project['project']['version']}"
    extras = re.search(r"'\.\[([\w,]+)\]'", text)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["project"]["optional-dependencies"])
    assert {"cpu", "serve"} <= set(extras[1].split(","))
    (entry,) = re.findall(r'ENTRYPOINT \["(\w+)"\]', text)
    assert entry in project["project"]["scripts"]
    user = POD["securityContext"]
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}" in text
    copied = " ".join(re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)).split()
    wanted = {package.split("/")[0] for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert wanted | {project["project"]["readme"], *project["project"]["license-files"]} <= set(copied)
    assert all((REPOSITORY / path).exists() for path in copied)
