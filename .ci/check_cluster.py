"""Validates the files in cluster/ with tools that need no cloud; `make cluster-check` gives it those tools for the moment.

shellcheck and hadolint by their commands; Kubernetes objects, and the pod templates inside KubeRay's, by Kubernetes' own schemas.
Ray's validation of the `ray up` files and KubeRay's fields are in tests/.
"""

import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import yaml

CLUSTER = Path(__file__).resolve().parents[1] / "cluster"
KUBERNETES = "1.33"


def pod_templates(document: dict) -> list[dict]:
    spec = document["spec"]
    spec = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def main() -> int:
    failed = 0
    for tool, files in (("shellcheck", sorted(CLUSTER.glob("*.sh"))), ("hadolint", sorted(CLUSTER.glob("Dockerfile*")))):
        code = subprocess.run([tool, *files]).returncode
        print(f"{tool}: {', '.join(file.name for file in files)}: {'failed' if code else 'no findings'}")
        failed += bool(code)
    for file in sorted((CLUSTER / "kuberay").glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            ray = document["kind"].startswith("Ray")
            templates = pod_templates(document) if ray else []
            pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template} for template in templates]
            try:
                for found in pods or [document]:
                    kubernetes_validate.validate(found, KUBERNETES, strict=True)
                what = f"{len(pods)} pod templates" if ray else document["kind"]
                print(f"Kubernetes {KUBERNETES}: {file.name}: {what}: no findings")
            except kubernetes_validate.ValidationError as error:
                print(f"Kubernetes {KUBERNETES}: {file.name}: {error.message}")
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
