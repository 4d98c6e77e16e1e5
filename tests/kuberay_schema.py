"""What KubeRay takes, as JSON schemas: the fields of `ray.io/v1` RayCluster and RayJob, and of pods what we use.

Written anew from KubeRay's public field reference (versions 1.6 and 1.7; KubeRay is Apache-2.0). The published CRD lets
a pod have all fields of Kubernetes; here a pod has the ones that our manifests name, so that a misspelled one fails.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
ANYTHING: Schema = {"type": "object"}
QUANTITIES: Schema = {
    "type": "object",
    "additionalProperties": {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$"},
}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def fields(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


RESOURCES = fields(requests=QUANTITIES, limits=QUANTITIES)
CONTAINER = fields(
    ("name", "image"),
    name=TEXT,
    image=TEXT,
    ports=list_of(fields(("containerPort",), containerPort=WHOLE, name={"type": "string", "maxLength": 15})),
    resources=RESOURCES,
    env=list_of(fields(("name",), name=TEXT, value=TEXT, valueFrom=ANYTHING)),
    volumeMounts=list_of(fields(("name", "mountPath"), name=TEXT, mountPath=TEXT, readOnly=FLAG, subPath=TEXT)),
)
TOLERATION = fields(
    key=TEXT,
    operator=one_of("Exists", "Equal"),
    value=TEXT,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
)
VOLUME = fields(("name",), name=TEXT, persistentVolumeClaim=fields(("claimName",), claimName=TEXT, readOnly=FLAG))
POD_TEMPLATE = fields(
    metadata=ANYTHING,
    spec=fields(
        ("containers",),
        containers={**list_of(CONTAINER), "minItems": 1},
        volumes=list_of(VOLUME),
        securityContext=fields(fsGroup=WHOLE, runAsUser=WHOLE, runAsGroup=WHOLE),
        tolerations=list_of(TOLERATION),
        nodeSelector=TEXTS,
        serviceAccountName=TEXT,
    ),
)
HEAD_GROUP = fields(
    ("template",),
    template=POD_TEMPLATE,
    headService=ANYTHING,
    enableIngress=FLAG,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
)
WORKER_GROUP = fields(
    ("groupName", "maxReplicas", "minReplicas", "template"),
    groupName=TEXT,
    suspend=FLAG,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    idleTimeoutSeconds=WHOLE,
    numOfHosts=WHOLE,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    scaleStrategy=ANYTHING,
    template=POD_TEMPLATE,
)
CLUSTER_SPEC = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    suspend=FLAG,
    managedBy=TEXT,
    authOptions=fields(mode=one_of("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        resources=RESOURCES,
        image=TEXT,
        imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
        idleTimeoutSeconds=WHOLE,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        version=one_of("v1", "v2"),
    ),
    gcsFaultToleranceOptions=ANYTHING,
    headServiceAnnotations=TEXTS,
    upgradeStrategy=ANYTHING,
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=list_of(WORKER_GROUP),
)
JOB_SPEC = fields(
    activeDeadlineSeconds=WHOLE,
    backoffLimit=WHOLE,
    rayClusterSpec=CLUSTER_SPEC,
    submitterPodTemplate=POD_TEMPLATE,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=fields(backoffLimit=WHOLE),
    managedBy=TEXT,
    deletionStrategy=ANYTHING,
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=WHOLE,
    shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
)


def manifest(kind: str, spec: Schema) -> Schema:
    return fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=fields(name=TEXT, generateName=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS),
        spec=spec,
    )


MANIFESTS = {"RayCluster": manifest("RayCluster", CLUSTER_SPEC), "RayJob": manifest("RayJob", JOB_SPEC)}
